"""What attention is given in tests, and its formula."""

import numpy as np


def inputs(rows=2, heads=3, length=6, keys=6, width=4):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    q, k, v = (draw(rows, n, heads, width) for n in (length, keys, keys))
    return q, k, v, draw(1, heads, length, keys), rng.random((rows, 1, 1, keys)) < 0.7


def exact(q, k, v, bias=0.0, mask=True):
    """The formula in float64."""
    q, k, v = (np.float64(x).transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]) + bias
    weights = np.where(mask, np.exp(scores), 0)
    return (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3)
