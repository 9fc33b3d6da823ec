"""Small state dicts, saved and compared."""

import numpy as np
import torch

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
