"""Files with some bytes wrong: every reader returns or refuses in one line.

A few mutants here, the same ones each time; tests/fuzzing/run.py looks for more.
"""

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
