"""Files from strangers: nothing in them runs, and nothing costs more than it holds."""

import argparse
import io
import json
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT

from sit_jax import array_files, config, torch_files
from sit_jax.array_files import ArrayFile, load
from sit_jax.data.images import BrokenImage, rgb
from sit_jax.errors import UserError
from sit_jax.job import of_manifest

RUNS = r"it would run \w*(posix|os|nt)\.mkdir; a file of weights must not run code"
MEMORY = 3 * 2**30  # bytes of address space; importing torch alone takes 1.5


class Runs:
    """Pickled, it is a call of os.mkdir."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Dict(dict):
    pass


def code(path):
    """Opcodes that call os.mkdir(path), old style."""
    return b"cposix\nmkdir\n(V" + str(path).encode() + b"\ntR"


def zipped(path, pickled, **members):
    """The zip of torch.save around a pickle; members: more of them."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        for name, content in members.items():
            archive.writestr(name, content)


def saved(content):
    return lambda path, ran: torch.save(content(Runs(ran)), path)


def raw(pickled):
    return lambda path, ran: path.write_bytes(pickled(ran))


def inside(pickled, **members):
    return lambda path, ran: zipped(path, pickled(ran), **members)


def tar(path, ran):
    with tarfile.open(path, "w") as archive:
        for name, content in (("storages", b"I0\n."), ("pickle", code(ran) + b".")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def compressed(path, ran):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", code(ran) + b"." + bytes(10**6))


def laughs(ran):
    """A tuple of two of a tuple of two of ...: 2**60 objects to whom compares them."""
    twice = b"".join(bytes([ord("q"), i, ord("h"), i, 0x86]) for i in range(60))
    return b"\x80\x02)" + twice + b"}q\xffh\xff\x86."


def storage(numbers):
    """A pickle of one storage of so many numbers."""
    words = ("storage", "F", "0", "cpu", numbers)

    class File(pickle.Pickler):
        def persistent_id(self, value):
            return words if value is words else None

    file = io.BytesIO()
    File(file, 2).dump({"a": words})
    return file.getvalue()


FORMS = {
    "reduce": (saved(lambda runs: runs), RUNS),
    "build": (
        inside(lambda ran: b"\x80\x02cposix\nmkdir\n)\x81}X\1\0\0\0aK\1sb."),
        RUNS,
    ),
    "nested": (saved(lambda runs: {"ema": [{"a": (1, [runs])}]}), RUNS),
    "in args": (
        saved(lambda runs: {"ema": {}, "args": argparse.Namespace(x=runs)}),
        RUNS,
    ),
    "subclass of dict": (
        saved(lambda runs: Dict(a=runs)),
        r"it would run [\w.]*\.Dict; a file",
    ),
    "tar": (tar, RUNS),
    "zip with an odd member": (
        inside(lambda ran: b"}.", **{"archive/code/evil.py": b"import os"}),
        "it holds 'archive/code/evil.py', which torch.save never adds",
    ),
    "zip with a member that climbs": (
        inside(lambda ran: b"}.", **{"../../evil": b""}),
        "it holds '../../evil', which",
    ),
    "persistent id": (
        inside(lambda ran: b"\x80\x02X\4\0\0\0evilQ."),
        "asks for an object of its writer's",
    ),
    "old persistent id": (raw(lambda ran: b"Pevil\n."), "object of its writer's"),
    "huge length": (
        inside(lambda ran: b"\x80\x02X\xff\xff\xff\x7fabc."),
        "damaged or no file of weights",
    ),
    "huge storage": (inside(lambda ran: storage(10**15)), "1000000000000000 numbers"),
    "bomb of references": (inside(laughs), "unfolds into more objects"),
    "bomb of depth": (
        inside(lambda ran: b"\x80\x02)" + b"\x85" * 10**5 + b"}\x86."),
        "unfolds into more objects",
    ),
    "bomb of a zip": (compressed, "'a/data.pkl' is compressed"),
    "bomb of an allowed name": (
        inside(lambda ran: b"\x80\x02cbuiltins\nbytearray\n\x8a\6@@@@@@\x85R."),
        "it would run builtins.bytearray",
    ),
    "old pickle": (raw(lambda ran: code(ran) + b"."), RUNS),
    "new pickle": (raw(lambda ran: pickle.dumps(Runs(ran), 5)), RUNS),
    "before torch 1.6": (
        lambda path, ran: torch.save(
            Runs(ran), path, _use_new_zipfile_serialization=False
        ),
        RUNS,
    ),
    "no pickle of torch": (raw(lambda ran: pickle.dumps({1: 2})), "none of torch's"),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_weights_file_runs_nothing_and_says_why(tmp_path, form):
    write, told = FORMS[form]
    path, ran = tmp_path / "x.pt", tmp_path / "ran"
    write(path, ran)
    with pytest.raises(UserError, match=told) as caught:
        torch_files.read(path)
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
        torch_files.read(tmp_path / "x.pt")


def npy(shape, descr="<f4", data=b""):
    file = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data


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
    monkeypatch.setattr(array_files, "ROW", 2**10)
    content, told = ARRAYS[form]
    if isinstance(content, np.ndarray):
        file = io.BytesIO()
        np.save(file, content, allow_pickle=True)
        content = file.getvalue()
    path = tmp_path / f"x.{kind}"
    if kind == "npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", content)
    read = load if kind == "npy" else lambda path: ArrayFile(path).array("a")
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
    "x.npy": (npy((2**40,)), "is said to be"),
    "x.png": (png(2**20, 2**20), "pixels"),
}


def read_bomb(path):
    if path.suffix == ".safetensors":
        return torch_files.read(path)
    if path.suffix == ".png":
        return rgb(path.read_bytes())
    return load(path) if path.suffix == ".npy" else ArrayFile(path).array("a")


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
from pathlib import Path
from sit_jax import torch_files
from sit_jax.errors import UserError
import PIL.Image, PIL.PngImagePlugin, safetensors, torch, ml_dtypes
from test_strangers import read_bomb
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
limit = {MEMORY} + 1024 * before
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sorted(Path({str(tmp_path)!r}).iterdir()):
    try:
        (torch_files.read if path.suffix == ".pt" else read_bomb)(path)
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


@pytest.mark.parametrize("text", ["[" * 10**5, '{"job": ' * 10**5, "\udcff", "[1]"])
def test_json_that_is_none_is_one_line(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="no manifest|not the manifest"):
        of_manifest(path)


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "sit_jax.checkpoint.Checkpoints",
        "sit_jax.data.filling.open_plan",
        "sit_jax.data.pairs.to_pairs",
        "sit_jax.data.sources.os.mkdir",
        "sit_jax.codec.jax.jit",
        "optax.__builtins__.eval",
        "sit_jax.data",
        3,
    ],
)
def test_a_config_beside_weights_names_constructors_only(name):
    with pytest.raises(UserError, match="a stored config names|this version has no"):
        config.from_json({"make": {"name": name}})


def test_what_is_broken_in_a_picture_is_told_of_the_picture():
    for content in (b"", b"\x89PNG\r\n\x1a\n", png(4, 4), png(0, 0)):
        with pytest.raises(BrokenImage):
            rgb(content)
