"""Recorded and small files of PyTorch, and ones that would run code."""

import argparse
import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import torch
from helpers import small
from helpers.recorded import FOLDER, case, weights

from sit_jax import checkpoint
from sit_jax.convert import tensor_files
from sit_jax.convert.checkpoint import open_torch_file
from sit_jax.convert.export import CheckpointExport


def golden(name):
    return FOLDER / "weights" / f"{name}.pt"


def opened(name, **flags):
    """The weights of tests/golden, with what their shapes do not tell."""
    if "full" in name:
        return open_torch_file(golden(name), heads=2, **flags)
    model = case(f"{name[:3]}_forward_{name[4:]}")["model"]
    flags = {"family": name[:3], "heads": model["num_heads"]} | flags
    return open_torch_file(golden(name), **flags)


def stored(weights, directory):
    """What a checkpoint of these weights gives when it is opened."""
    items, meta = weights.items()
    small.save(directory, meta["step"], meta, **items)
    return CheckpointExport(*checkpoint.find_step(directory))


def loaded(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def assert_same_state(one, other):
    assert list(one) == list(other)
    for name in one:
        assert torch.equal(one[name], other[name]), name
        assert one[name].dtype == other[name].dtype
        assert one[name].is_contiguous()


def renamed(tmp_path, **changes):
    """train_sit_full.pt with other args."""
    content = loaded(golden("train_sit_full"))
    for name, value in changes.items():
        setattr(content["args"], name, value)
    torch.save(content, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def broken(tmp_path, change):
    state = dict(weights("sit_a"))
    change(state)
    tensor_files.write(tmp_path / "x.pt", state)
    return lambda: open_torch_file(tmp_path / "x.pt", family="sit", heads=4)


RNG = np.random.default_rng(0)


def state(**more):
    tensors = {"b.weight": torch.randn(3, 2), "a.bias": torch.randn(5)}
    return tensors | more


def saved(tmp_path, content, **options):
    path = tmp_path / "x.pt"
    torch.save(content, path, **options)
    return path


def same(tensors, expected):
    """Names in their order, and every bit."""
    assert list(tensors) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(tensors[name], np.asarray(array))
        assert tensors[name].dtype == np.float32


RUNS = r"it would run [\w., ]*(posix|os|nt)\.mkdir; a file of weights must not run"
DAMAGED = "damaged or no file of weights"


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


def torch_saved(content):
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
    "reduce": (torch_saved(lambda runs: runs), RUNS),
    "build": (
        inside(lambda ran: b"\x80\x02cposix\nmkdir\n)\x81}X\1\0\0\0aK\1sb."),
        RUNS,
    ),
    "nested": (torch_saved(lambda runs: {"ema": [{"a": (1, [runs])}]}), RUNS),
    "in args": (
        torch_saved(lambda runs: {"ema": {}, "args": argparse.Namespace(x=runs)}),
        RUNS,
    ),
    "subclass of dict": (
        torch_saved(lambda runs: Dict(a=runs)),
        r"it would run helpers\.torch_files\.Dict, ",
    ),
    "tar": (tar, DAMAGED),
    "zip with an odd member": (
        inside(lambda ran: b"}.", **{"archive/code/evil.py": b"import os"}),
        "holds no weights",
    ),
    "zip with a member that climbs": (
        inside(lambda ran: b"}.", **{"../../evil": b""}),
        DAMAGED,
    ),
    "persistent id": (
        inside(lambda ran: b"\x80\x02X\4\0\0\0evilQ."),
        DAMAGED,
    ),
    "old persistent id": (raw(lambda ran: b"Pevil\n."), DAMAGED),
    "huge length": (
        inside(lambda ran: b"\x80\x02X\xff\xff\xff\x7fabc."),
        DAMAGED,
    ),
    "huge storage": (inside(lambda ran: storage(10**15)), DAMAGED),
    "bomb of references": (inside(laughs), "holds a tuple"),
    "bomb of depth": (
        inside(lambda ran: b"\x80\x02)" + b"\x85" * 10**5 + b"}\x86."),
        "holds a tuple",
    ),
    "bomb of a zip": (compressed, DAMAGED),
    "bomb of an allowed name": (
        inside(lambda ran: b"\x80\x02cbuiltins\nbytearray\n\x8a\6@@@@@@\x85R."),
        DAMAGED,
    ),
    "old pickle": (raw(lambda ran: code(ran) + b"."), RUNS),
    "new pickle": (raw(lambda ran: pickle.dumps(Runs(ran), 5)), DAMAGED),
    "before torch 1.6": (
        lambda path, ran: torch.save(
            Runs(ran), path, _use_new_zipfile_serialization=False
        ),
        RUNS,
    ),
    "no pickle of torch": (raw(lambda ran: pickle.dumps({1: 2})), DAMAGED),
}  # fmt: skip


def npy(shape, descr="<f4", data=b""):
    file = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + data
