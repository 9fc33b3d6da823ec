"""Files with some bytes wrong: every reader returns or refuses in one line.

A few mutants here, the same ones each time; tests/fuzzing/run.py looks for more.
"""

import json

import pytest
from fuzzing.readers import READERS, check
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EDITS = st.lists(
    st.tuples(
        st.floats(0, 1),
        st.sampled_from(["set", "cut", "put"]),
        st.binary(min_size=1, max_size=9) | st.sampled_from([b"\xff" * 8, b"[" * 5000]),
    ),
    min_size=1,
    max_size=4,
)


def mutant(data, edits):
    """edits: where (0 the beginning, 1 the end), what is done there, with what."""
    for where, what, new in edits:
        at = int(where * len(data))
        after = {"set": at + len(new), "cut": len(data), "put": at}[what]
        data = data[:at] + (b"" if what == "cut" else new) + data[after:]
    return data


@pytest.mark.parametrize("name", READERS)
def test_files_in_order_are_read(name):
    ending, read, files = READERS[name]
    for data in files():
        check(name, data)


@pytest.mark.parametrize("name", READERS)
def test_mutants_are_read_or_refused(name):
    files = list(READERS[name][2]())

    @settings(
        max_examples=60,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(range(len(files))), EDITS)
    def look(which, edits):
        check(name, mutant(files[which], edits))

    look()


FOUND = {  # by tests/fuzzing/run.py, or by the mutants above
    "npy": [b"\x93NUMPY\1\0\x10\0{'descr': '<f4'{"],
    "config": [b'{"a": {".name": 1}}', b'{"make": {"a.b": null}}'],
    "manifest": [b'{"job": {".name": 1}}'],
    "adapter_config": [
        b'{"peft_type": "LORA", "rank_pattern": {"%s": 1}}' % pattern
        for pattern in (b"(a+)+$", b"(", b"(b|bl|blo)*x", b".*.*.*.*.*x")
    ],
    "metadata": [b'"x"', b"[1]", *(b'{"shards": %d}' % n for n in (0, -1))],
    "graph": [
        b"\n)\n\x01a\x12\x05Const*\x1d\n\x05value\x12\x14@\x12\x08\x01\x12\x04"
        b'\x12\x02\x08\x02"\x08\0\0\x80?\0\0\x80?'
    ],
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once(name):
    for data in FOUND[name]:
        check(name, data)


@pytest.mark.parametrize("change", [{"shards": 0}, {"shape": [1]}, {"dtype": "O"}])
def test_metadata_that_makes_no_sense(change):
    whole = json.loads(next(iter(READERS["metadata"][2]())))
    check("metadata", json.dumps(whole | change).encode())
