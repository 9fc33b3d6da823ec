"""The recorded PyTorch inputs and outputs in tests/golden, and how close is close."""

import functools
import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / "golden"


@functools.cache
def case(name):
    """-> the description of one recorded case, from manifest.json."""
    cases = json.loads((FOLDER / "manifest.json").read_text())["cases"]
    return next(c for c in cases if c["id"] == name)


@functools.cache
def arrays(name):
    """-> {array name: numpy array}; images and latents are NCHW."""
    with np.load(FOLDER / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def weights(name):
    """-> the torch state dict (numpy arrays) of weights/<name>.pt, a bare file."""
    import torch

    state = torch.load(FOLDER / "weights" / f"{name}.pt", weights_only=True)
    return {key: value.numpy() for key, value in state.items()}


def nhwc(x):
    return np.moveaxis(np.asarray(x), -3, -1)


def nchw(x):
    return np.moveaxis(np.asarray(x), -1, -3)


def relative(ours, theirs):
    """L2 norm of the difference over the L2 norm of theirs."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
