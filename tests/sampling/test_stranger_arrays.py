"""Arrays and pictures from strangers: numbers, and no more than they say."""

import io
import zipfile

import numpy as np
import pytest
from helpers.torch_files import Runs, npy

from sit_jax.errors import UserError
from sit_jax.sampling import outputs
from sit_jax.sampling.job import read_manifest
from sit_jax.sampling.outputs import ArrayFile

ARRAYS = {
    "objects": (np.array([Runs("x")], object), "holds Python objects"),
    "shape": (npy((10**9, 10**9)), "is said to be float32"),
    "negative": (npy((-1, -1), data=b"abcd"), "is said to be|damaged|no whole"),
    "empty rows": (npy((10**18, 0)), "a row of 0 bytes"),
    "no size": (npy((10**18,), "|S0"), "a row of 0 bytes"),
    "wide": (npy((1, 2**10), "|u1") + bytes(2**10), None),
    "wider": (npy((1, 2**10 + 1), "|u1") + bytes(2**10 + 1), "a row of 1025 bytes"),
    "cut": (npy((3,), data=b"abc"), "is said to be"),
    "code": (b"\x93NUMPY\1\0\x50\0{'descr': open('ran', 'w')}", "damaged|no whole"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["npy", "npz"])
@pytest.mark.parametrize("form", ARRAYS)
def test_arrays_hold_numbers_and_no_more_than_they_say(
    tmp_path, monkeypatch, form, kind
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(outputs, "ROW", 2**10)
    content, told = ARRAYS[form]
    if isinstance(content, np.ndarray):
        file = io.BytesIO()
        np.save(file, content)
        content = file.getvalue()
    path = tmp_path / f"x.{kind}"
    if kind == "npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", content)
    read = (
        outputs.load_npy if kind == "npy" else lambda path: ArrayFile(path).array("a")
    )
    if told is None:
        assert read(path).nbytes == 2**10
    else:
        with pytest.raises(UserError, match=told):
            read(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../x.npy", "/x.npy", "a\\..\\x.npy"])
def test_names_that_climb_out_of_an_npz_are_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr(name, b"")
    with pytest.raises(UserError, match="leads out of it"):
        ArrayFile(tmp_path / "x.npz")


@pytest.mark.parametrize("text", ["[" * 10**5, '{"job": ' * 10**5, "\udcff", "[1]"])
def test_json_that_is_none_is_one_line(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="no manifest|not the manifest"):
        read_manifest(path)
