"""The recorded files of PyTorch, opened, stored as checkpoints and read back."""

import argparse

import torch
from helpers import small
from helpers.recorded import FOLDER, case, weights

from sit_jax import checkpoint
from sit_jax.convert import tensor_files
from sit_jax.convert.checkpoint import CheckpointExport, open_torch_file
from sit_jax.recipes import published as base


def golden(name):
    return FOLDER / "weights" / f"{name}.pt"


def opened(name, **flags):
    """The weights of tests/golden, with what their shapes do not tell."""
    if "full" in name:
        return open_torch_file(golden(name), base, heads=2, **flags)
    model = case(f"{name[:3]}_forward_{name[4:]}")["model"]
    flags = {"family": name[:3], "heads": model["num_heads"]} | flags
    return open_torch_file(golden(name), base, **flags)


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
    return lambda: open_torch_file(tmp_path / "x.pt", base, family="sit", heads=4)
