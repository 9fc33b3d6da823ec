"""Files from strangers: nothing in them runs, and nothing costs more than it holds."""

import json
import pickletools
import struct
import subprocess
import sys
import zipfile
import zlib

import pytest
import torch
from helpers import ROOT
from helpers.torch_files import FORMS, code, laughs, npy

from sit_jax.convert.state_dict import read_torch_file
from sit_jax.data.images import CorruptImage, to_rgb
from sit_jax.errors import UserError
from sit_jax.sampling.outputs import ArrayFile, load_npy

MEMORY = 3 * 2**30  # bytes of address space; importing torch alone takes 1.5


@pytest.mark.parametrize("form", FORMS)
def test_a_weights_file_runs_nothing_and_says_why(tmp_path, form):
    write, told = FORMS[form]
    path, ran = tmp_path / "x.pt", tmp_path / "ran"
    write(path, ran)
    with pytest.raises(UserError, match=told) as caught:
        read_torch_file(path)
    assert "x.pt" in str(caught.value) and "\n" not in str(caught.value)
    assert not ran.exists()


def test_the_payload_would_run(tmp_path):
    """Or the test above would prove nothing."""
    program = f"import pickle; pickle.load(open({str(tmp_path / 'x')!r}, 'rb'))"
    (tmp_path / "x").write_bytes(code(tmp_path / "ran") + b".")
    subprocess.run([sys.executable, "-c", program], check=True)
    assert (tmp_path / "ran").exists()
    assert list(pickletools.genops(laughs(None)))[-1][0].name == "STOP"


def test_a_view_that_repeats_a_number_is_no_weight(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"a is \[1000000, 1000000\], but the whole"):
        read_torch_file(tmp_path / "x.pt")


def png(width, height, packed=b""):
    """A PNG that says it is so large."""
    chunk = lambda kind, data: (
        struct.pack(">I", len(data))
        + kind
        + data
        + struct.pack(">I", zlib.crc32(kind + data))
    )
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + packed + chunk(b"IEND", b"")


def safe(header, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


F32 = {"dtype": "F32", "shape": [2**20, 2**20], "data_offsets": [0, 2**42]}
BOMBS = {  # file name: content, the refusal
    "x.safetensors": (safe({"a": F32}), "damaged"),
    "header.safetensors": (safe(b"{}", 2**62), "damaged"),
    "shape.safetensors": (
        safe({"a": F32 | {"shape": [2**63, 2**62, 2], "data_offsets": [0, 0]}}),
        "damaged",
    ),
    "x.npy": (npy((2**40,)), "no whole"),
    "x.png": (png(2**20, 2**20), "pixels"),
}


def read_bomb(path):
    if path.suffix == ".safetensors":
        return read_torch_file(path)
    if path.suffix == ".png":
        return to_rgb(path.read_bytes())
    return load_npy(path) if path.suffix == ".npy" else ArrayFile(path).array("a")


@pytest.mark.parametrize("name", BOMBS)
def test_what_it_says_of_its_size_is_not_believed(tmp_path, name):
    content, told = BOMBS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        read_bomb(tmp_path / name)


def large(path, name, size):
    """A zip whose one member unpacks to so many zeros, or more."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open(name, "w") as entry:
            entry.write(npy((size // 4,)))
            for _ in range(size // 2**22):
                entry.write(bytes(2**22))


def test_bombs_cost_no_memory(tmp_path):
    """All of them in one process, which may not take more than a little."""
    for name, (content, _) in BOMBS.items():
        (tmp_path / name).write_bytes(content)
    large(tmp_path / "x.npz", "a.npy", 2**28)
    for form in ("huge length", "huge storage", "bomb of references", "bomb of depth"):
        FORMS[form][0](tmp_path / f"{form}.pt", None)
    FORMS["bomb of an allowed name"][0](tmp_path / "name.pt", None)
    program = f"""
import resource, sys
sys.path.insert(0, "tests/convert")
from pathlib import Path
from sit_jax.convert.state_dict import read_torch_file
from sit_jax.errors import UserError
import PIL.Image, PIL.PngImagePlugin, safetensors, torch, ml_dtypes
from test_strangers import read_bomb
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
limit = {MEMORY} + 1024 * before
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    try:
        (read_torch_file if path.suffix == ".pt" else read_bomb)(path)
        print("read", path)
    except UserError:
        pass
print("grew by", (peak() - before) // 1024, "MiB")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("grew by"), done.stdout
    assert int(done.stdout.split()[2]) < 64


def test_what_is_broken_in_a_picture_is_told_of_the_picture():
    for content in (b"", b"\x89PNG\r\n\x1a\n", png(4, 4), png(0, 0)):
        with pytest.raises(CorruptImage):
            to_rgb(content)
