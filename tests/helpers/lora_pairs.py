"""Pairs of factors and the weight they add."""

import numpy as np

from sit_jax.convert.peft import LoRAPair


def pair(rank, out=6, width=4, seed=0, **more):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return LoRAPair(draw(rank, width), draw(out, rank), **more)
