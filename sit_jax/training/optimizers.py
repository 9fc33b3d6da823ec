"""Adan: Adam with a look at how the gradient changes. Xie et al., arXiv:2208.06677.

Algorithm 1 as its authors publish it (sail-sg/Adan), which is not what optax.adan
computes: that one weighs the change of the gradient by 1 - b2 where this one weighs it
by b2, and after five steps is off by more than half a learning rate.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sit_jax.errors import UserError


class AdanState(NamedTuple):
    """Trees like the weights: averages of gradient, of its change, of its square."""

    count: jax.Array  # int []
    mean: dict
    change: dict
    square: dict
    negative: dict  # minus the gradient of the step before, as the original stores it


def adan(learning_rate, b1=0.98, b2=0.92, b3=0.99, eps=1e-8, weight_decay=0.0):
    """-> optax transformation; learning_rate is a number or a schedule.

    b1, b2, b3 are the shares kept of the three averages (the paper's 1 - beta). The
    decay is decoupled and proximal: weights are divided by 1 + rate * weight_decay.
    Clip the gradient before it, by its global norm (config.clip): the original clips
    inside, and as MDT splits the optimizer over its ranks, each rank clips its part
    by the norm of that part, so that how much depends on their number.
    """
    shares = {"b1": b1, "b2": b2, "b3": b3}
    for name, value in shares.items():
        if not 0 < value < 1:
            raise UserError(f"adan's {name} is {value}; it must be between 0 and 1")

    def update(grads, state, params=None):
        if params is None:
            raise ValueError("adan needs the weights: tx.update(grads, state, params)")
        new = _averaged(grads, state, b1, b2, b3)
        given = callable(learning_rate)
        rate = learning_rate(state.count) if given else learning_rate
        # 1 - b^count, whose digits float32 would lose at the first steps
        log = {name: math.log(b) for name, b in shares.items()}
        bias = {name: -jnp.expm1(new.count * each) for name, each in log.items()}

        def step(m, v, n, weight):
            scale = jnp.sqrt(n) / jnp.sqrt(bias["b3"]) + eps
            move = (m / bias["b1"] + b2 * v / bias["b2"]) / scale
            return -rate * (move + weight_decay * weight) / (1 + rate * weight_decay)

        return jax.tree.map(step, new.mean, new.change, new.square, params), new

    return optax.GradientTransformation(_begun, update)


def _begun(params):
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return AdanState(jnp.zeros((), jnp.int32), *(zeros() for _ in range(4)))


def _averaged(grads, state, b1, b2, b3):
    """The state with a step's gradient in its averages."""
    # the first change is 0
    change = lambda g, n: jnp.where(state.count == 0, 0.0, g + n)
    changes = jax.tree.map(change, grads, state.negative)
    look = jax.tree.map(lambda g, d: jnp.square(g + b2 * d), grads, changes)
    average = lambda b: lambda new, old: b * old + (1 - b) * new
    return AdanState(
        count=optax.safe_increment(state.count),
        mean=jax.tree.map(average(b1), grads, state.mean),
        change=jax.tree.map(average(b2), changes, state.change),
        square=jax.tree.map(average(b3), look, state.square),
        negative=jax.tree.map(jnp.negative, grads),
    )
