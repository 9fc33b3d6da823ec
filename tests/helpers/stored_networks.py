"""Networks of every kind, with adapters on their weights."""

from functools import cache, partial

import jax
import numpy as np
import optax

from sit_jax.adapters.weights import ExtraRows, LoRAWeight, replace_weights
from sit_jax.models.dit import DiT, SiT
from sit_jax.models.mdt import MDT, MDTv2
from sit_jax.training.state import init_params

SHAPE, SIZE = (4, 4, 2), dict(width=16, heads=2, classes=5)
MODELS = [SiT(depth=2, **SIZE), DiT(depth=2, **SIZE), MDT(depth=4, **SIZE)]
MODELS += [MDTv2(depth=6, **SIZE)]
EVERY = ".*"
HIGHEST = jax.lax.Precision.HIGHEST
TX = optax.adam(1e-2)


@cache
def weights(model):
    """Random ones everywhere: as drawn, most gates would be zero."""
    like = jax.eval_shape(partial(init_params, model, SHAPE), jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    return jax.tree.map(draw, like)


def adapter(path, weight, rank=3, zero=False, dora=False, **settings):
    rng = np.random.default_rng(len(path))
    draw = lambda *shape: 0.3 * rng.standard_normal(shape).astype(np.float32)
    *lead, fan_in, fan_out = weight.shape
    up = draw(*lead, rank, fan_out) * (not zero)
    magnitude = 1 + draw(*lead, fan_out) if dora and "kernel" in path else None
    down = draw(*lead, fan_in, rank)
    return LoRAWeight(weight, down, up, magnitude, **{"scale": 0.5, **settings})


def inputs(n=2):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, *SHAPE)).astype(np.float32)
    return x, np.linspace(0.2, 0.9, n, dtype=np.float32), np.arange(n) % 6


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def first(stored):
    """Its first layer."""
    return jax.tree.map(lambda leaf: leaf[0], stored)


def equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def adapted(model=MODELS[0], pattern=r"blocks/(attn/qkv|mlp/fc1)/kernel", **settings):
    tree = replace_weights(weights(model), pattern, partial(adapter, **settings))
    more = np.zeros((2, 16), np.float32)
    return replace_weights(
        tree, "cond/label/embedding", lambda _, w: ExtraRows(w, more)
    )
