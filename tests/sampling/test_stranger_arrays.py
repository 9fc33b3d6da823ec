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
    "objects": (np.array([Runs("x")], object), "Python objects|Object arrays"),
    "shape": (npy((10**9, 10**9)), "is said to be|no whole"),
    "negative": (npy((-1, -1), data=b"abcd"), "is said to be|no whole"),
    "cut": (npy((3,), data=b"abc"), "is said to be|no whole"),
    "code": (b"\x93NUMPY\1\0\x50\0{'descr': open('ran', 'w')}", "damaged|no whole"),
}


@pytest.mark.parametrize("kind", ["npy", "npz"])
@pytest.mark.parametrize("form", ARRAYS)
def test_arrays_hold_numbers_and_no_more_than_they_say(
    tmp_path, monkeypatch, form, kind
):
    monkeypatch.chdir(tmp_path)
    content, message = ARRAYS[form]
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
    with pytest.raises(UserError, match=message):
        outputs.load_npy(path) if kind == "npy" else ArrayFile(path).array("a")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["[" * 10**5, '{"job": ' * 10**5, "\udcff", "[1]"])
def test_json_that_is_none_is_one_line(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="no manifest|not the manifest"):
        read_manifest(path)
