"""Adan: Adam with a look at how the gradient changes.

Algorithm 1 as its authors publish it (sail-sg/Adan), which is not what optax.adan
computes: that one weighs the change of the gradient by 1 - b2 where this one weighs it
by b2, and after five steps is off by more than half a learning rate.

Source: Xie et al., arXiv:2208.06677.
"""

import math
from typing import NamedTuple

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

    def init(params: Params) -> AdanState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        count = jnp.zeros((), jnp.int32)
        return AdanState(count, zeros(), zeros(), zeros(), zeros())

    def update(
        grads: Params, state: AdanState, params: Params | None = None
    ) -> tuple[Params, AdanState]:
        if params is None:
            raise ValueError("adan needs the weights: tx.update(grads, state, params)")
        # the first change is 0
        difference = lambda g, n: jnp.where(state.count == 0, 0.0, g + n)
        changes = jax.tree.map(difference, grads, state.negative)
        ahead = jax.tree.map(lambda g, d: g + b2 * d, grads, changes)
        new = AdanState(
            count=optax.safe_increment(state.count),
            mean=optax.tree.update_moment(grads, state.mean, b1, 1),
            change=optax.tree.update_moment(changes, state.change, b2, 1),
            square=optax.tree.update_moment(ahead, state.square, b3, 2),
            negative=jax.tree.map(jnp.negative, grads),
        )
        is_schedule = callable(learning_rate)
        rate = learning_rate(state.count) if is_schedule else learning_rate
        # 1 - b^count, whose digits float32 would lose at the first steps
        bias = {n: -jnp.expm1(new.count * math.log(b)) for n, b in decays.items()}

        def step(m: Array, v: Array, n: Array, weight: Array) -> Array:
            scale = jnp.sqrt(n) / jnp.sqrt(bias["b3"]) + eps
            move = (m / bias["b1"] + b2 * v / bias["b2"]) / scale
            return -rate * (move + weight_decay * weight) / (1 + rate * weight_decay)

        return jax.tree.map(step, new.mean, new.change, new.square, params), new

    return optax.GradientTransformation(init, update)
