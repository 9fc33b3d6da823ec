"""Adan: Adam with a look at how the gradient changes.

Algorithm 1 as its authors publish it (sail-sg/Adan), which is not what optax.adan
computes: that one weighs the change of the gradient by 1 - b2 where this one weighs it
by b2, and after five steps is off by more than half a learning rate.

Source: Xie et al., arXiv:2208.06677.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from sit_jax.errors import UserError
from sit_jax.typing import Params


class AdanState(NamedTuple):
    """Averages of the gradient, of its change and of its square; trees like params."""

    count: Int[Array, ""]  # type: ignore[assignment]  # hides tuple.count
    mean: Params
    change: Params
    square: Params
    negative: Params  # minus the gradient of the step before, as the original stores it


def adan(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.98,
    b2: float = 0.92,
    b3: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Returns the optimizer as an optax transformation.

    Clip the gradient before it, by its global norm (config.clip): the original clips
    inside, and as MDT splits the optimizer over its ranks, each rank clips its part by
    the norm of that part, so that how much depends on their number.

    Args:
      learning_rate: a number or a schedule.
      b1, b2, b3: shares kept of the three averages (the paper's 1 - beta).
      eps: added to the root of the square's average.
      weight_decay: decoupled and proximal: weights are divided by
        1 + learning_rate * weight_decay.
    """
    decays = {"b1": b1, "b2": b2, "b3": b3}
    for name, value in decays.items():
        if not 0 < value < 1:
            raise UserError(f"adan's {name} is {value}; it must be between 0 and 1")

    def update(
        grads: Params, state: AdanState, params: Params | None = None
    ) -> tuple[Params, AdanState]:
        if params is None:
            raise ValueError("adan needs the weights: tx.update(grads, state, params)")
        new = _update_averages(grads, state, b1, b2, b3)
        is_schedule = callable(learning_rate)
        rate = learning_rate(state.count) if is_schedule else learning_rate
        # 1 - b^count, whose digits float32 would lose at the first steps
        logs = {name: math.log(b) for name, b in decays.items()}
        bias = {name: -jnp.expm1(new.count * log) for name, log in logs.items()}

        def step(m: Array, v: Array, n: Array, weight: Array) -> Array:
            scale = jnp.sqrt(n) / jnp.sqrt(bias["b3"]) + eps
            move = (m / bias["b1"] + b2 * v / bias["b2"]) / scale
            return -rate * (move + weight_decay * weight) / (1 + rate * weight_decay)

        return jax.tree.map(step, new.mean, new.change, new.square, params), new

    return optax.GradientTransformation(_init, update)


def _init(params: Params) -> AdanState:
    zeros = lambda: jax.tree.map(jnp.zeros_like, params)
    return AdanState(
        count=jnp.zeros((), jnp.int32),
        mean=zeros(),
        change=zeros(),
        square=zeros(),
        negative=zeros(),
    )


def _update_averages(
    grads: Params, state: AdanState, b1: float, b2: float, b3: float
) -> AdanState:
    """Returns the state with a step's gradient in its averages."""
    # the first change is 0
    difference = lambda g, n: jnp.where(state.count == 0, 0.0, g + n)
    changes = jax.tree.map(difference, grads, state.negative)
    ahead = jax.tree.map(lambda g, d: jnp.square(g + b2 * d), grads, changes)

    def average(decay: float, new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: decay * b + (1 - decay) * a, new, old)

    return AdanState(
        count=optax.safe_increment(state.count),
        mean=average(b1, grads, state.mean),
        change=average(b2, changes, state.change),
        square=average(b3, ahead, state.square),
        negative=jax.tree.map(jnp.negative, grads),
    )
