"""Pairs of factors and the weight they add."""

import numpy as np

from sit_jax.convert.lora_names import Pair


def pair(rank, out=6, width=4, seed=0, **more):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return Pair(draw(rank, width), draw(out, rank), **more)
