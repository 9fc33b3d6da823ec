"""Adan against its published formula in float64, and what it is not."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sit_jax.errors import UserError
from sit_jax.training.optimizers import adan

STEPS = 20
RNG = np.random.default_rng(0)
WEIGHTS = {"a": RNG.normal(size=(3, 4)), "b": RNG.normal(size=5)}
GRADS = [
    {name: RNG.normal(size=value.shape) * 10 ** RNG.uniform(-2, 1)}
    | {
        other: RNG.normal(size=WEIGHTS[other].shape)
        for other in WEIGHTS
        if other != name
    }
    for i in range(STEPS)
    for name, value in [list(WEIGHTS.items())[i % 2]]
]


def published(weights, grads, rate, decay, clip, b=(0.98, 0.92, 0.99), eps=1e-8):
    """sail-sg/Adan step by step, all parameters clipped by one norm, float64.

    rate(k) is the learning rate of step k = 1, 2, ...
    """
    zeros = lambda: {name: np.zeros(w.shape) for name, w in weights.items()}
    m, v, n, last = zeros(), zeros(), zeros(), None
    weights = dict(weights)
    for k, grad in enumerate(grads, start=1):
        norm = np.sqrt(sum((g**2).sum() for g in grad.values()))
        grad = {name: min(1, clip / (norm + eps)) * g for name, g in grad.items()}
        last = last or grad
        for name, g in grad.items():
            d = g - last[name]
            m[name] = b[0] * m[name] + (1 - b[0]) * g
            v[name] = b[1] * v[name] + (1 - b[1]) * d
            n[name] = b[2] * n[name] + (1 - b[2]) * (g + b[1] * d) ** 2
            den = np.sqrt(n[name]) / np.sqrt(1 - b[2] ** k) + eps
            step = m[name] / (1 - b[0] ** k) + b[1] * v[name] / (1 - b[1] ** k)
            moved = weights[name] - rate(k) * step / den
            weights[name] = moved / (1 + rate(k) * decay)
        last = grad
        yield dict(weights)


def ours(tx, count=STEPS):
    weights = jax.tree.map(jnp.float32, WEIGHTS)
    state = tx.init(weights)

    @jax.jit
    def step(weights, state, grads):
        updates, state = tx.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    for grads in GRADS[:count]:
        weights, state = step(weights, state, jax.tree.map(jnp.float32, grads))
        yield weights


def farthest(one, other):
    """Largest difference of any weight at any step, in units of the learning rate."""
    gaps = [
        np.abs(np.asarray(a[name], np.float64) - b[name]).max()
        for a, b in zip(one, other, strict=True)
        for name in WEIGHTS
    ]
    return max(gaps) / RATE


RATE = 0.01


@pytest.mark.parametrize("decay", [0.0, 0.5], ids=["no decay", "decay"])
def test_twenty_steps_are_those_of_the_formula(decay):
    """Rounding of weights near 1 in units of the rate is 1e-5, a sum of twenty 2e-4."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), adan(RATE, weight_decay=decay))
    theirs = list(published(WEIGHTS, GRADS, lambda k: RATE, decay, clip=1.0))
    assert farthest(ours(tx), theirs) < 2e-4
    norms = [optax.tree.norm(grads) for grads in GRADS]
    assert min(norms) > 1  # the clip is at work
    unclipped = list(published(WEIGHTS, GRADS, lambda k: RATE, decay, clip=1e9))
    assert farthest(ours(tx), unclipped) > 0.1


def test_the_rate_may_be_a_schedule_and_falls_as_released():
    """The released loop sets the rate after its step: the first two take it whole."""
    anneal = optax.linear_schedule(RATE, 0.0, 40, transition_begin=1)
    released = lambda k: RATE * (1 - max(k - 2, 0) / 40)
    theirs = published(WEIGHTS, GRADS, released, 0.1, clip=1e9)
    assert farthest(ours(adan(anneal, weight_decay=0.1)), theirs) < 2e-4


def test_optax_has_another_algorithm_under_the_name():
    theirs = list(published(WEIGHTS, GRADS, lambda k: RATE, 0.0, clip=1e9))
    other = lambda n: farthest(ours(optax.adan(RATE), n), theirs[:n])
    assert other(1) < 1e-4 and other(5) > 0.3


def test_impossible_shares_are_named():
    with pytest.raises(UserError, match="adan's b3 is 1.0"):
        adan(1e-3, b3=1.0)
