"""The probability-flow ODE on a fixed grid: Runge-Kutta and Adams methods.

A Runge-Kutta method is one step (slope, t, dt, x) -> x and its number of stages; to add
one, write a function like heun. The names are torchdiffeq's, so heun is its heun2 and
rk4 the 3/8 rule.

Adams' methods reuse the slopes of the steps before. As in torchdiffeq, the order rises
with the slopes known, up to 12, after two steps of the 3/8 rule. So high an order has a
small region of stability; with few or rough steps Runge-Kutta is the safer choice.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from numpy.polynomial import Polynomial

from sit_jax.samplers.base import (
    NUM_STATES,
    NUM_STEPS,
    TOLERANCE,
    ProbabilityFlowODE,
    SamplerResult,
    add_scaled,
    check_ranges,
    run_steps,
    weighted_sum,
)
from sit_jax.typing import NamedFunction, Slope

NUM_STARTING_STEPS = 2  # before there are slopes enough for Adams' methods
MAX_SLOPES = 11  # kept by Adams' methods


@dataclasses.dataclass(frozen=True, repr=False)
class ODEMethod(NamedFunction):
    """One step of a Runge-Kutta method, with `stages` evaluations of the slope."""

    stages: int = 1


@partial(ODEMethod, stages=1)
def euler(slope: Slope, t: Any, dt: Any, x: Any) -> Any:
    """Euler's method, of first order."""
    return add_scaled(x, (dt, slope(t, x)))


@partial(ODEMethod, stages=2)
def midpoint(slope: Slope, t: Any, dt: Any, x: Any) -> Any:
    """The midpoint method, of second order."""
    middle = add_scaled(x, (dt / 2, slope(t, x)))
    return add_scaled(x, (dt, slope(t + dt / 2, middle)))


@partial(ODEMethod, stages=2)
def heun(slope: Slope, t: Any, dt: Any, x: Any) -> Any:
    """The trapezoidal rule, with Euler's guess at the far end."""
    k1 = slope(t, x)
    k2 = slope(t + dt, add_scaled(x, (dt, k1)))
    return add_scaled(x, (dt / 2, k1), (dt / 2, k2))


@partial(ODEMethod, stages=3)
def heun3(slope: Slope, t: Any, dt: Any, x: Any) -> Any:
    """Heun's method of third order: stages at 0, 1/3 and 2/3."""
    k1 = slope(t, x)
    k2 = slope(t + dt / 3, add_scaled(x, (dt / 3, k1)))
    k3 = slope(t + 2 * dt / 3, add_scaled(x, (2 * dt / 3, k2)))
    return add_scaled(x, (dt / 4, k1), (3 * dt / 4, k3))


@partial(ODEMethod, stages=4)
def rk4(slope: Slope, t: Any, dt: Any, x: Any) -> Any:
    """Kutta's 3/8 rule, which errs less than his better known method."""
    k1 = slope(t, x)
    k2 = slope(t + dt / 3, add_scaled(x, (dt / 3, k1)))
    k3 = slope(t + 2 * dt / 3, add_scaled(x, (dt, k2), (-dt / 3, k1)))
    k4 = slope(t + dt, add_scaled(x, (dt, k1), (-dt, k2), (dt, k3)))
    return add_scaled(x, (dt / 8, k1), (3 * dt / 8, k2), (3 * dt / 8, k3), (dt / 8, k4))


@dataclasses.dataclass(frozen=True)
class FixedStepODE(ProbabilityFlowODE):
    """Equal steps of a Runge-Kutta method.

    Attributes:
      method: one of this module.
      steps: how many; each costs method.stages evaluations of the network.
      reverse: from data to noise.
      trajectory_length: how many states on the way to keep.
    """

    method: ODEMethod = heun
    steps: int = 50
    reverse: bool = False
    trajectory_length: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, steps=NUM_STEPS, trajectory_length=NUM_STATES)

    def solve(
        self, slope: Slope, start: PyTree[Array], t0: float, t1: float
    ) -> SamplerResult:
        """Follows a slope from a tree of arrays at t0 to t1."""
        times, dt = _time_grid(t0, t1, self.steps)
        step = lambda x, i: self.method(slope, times[i], dt[i], x)
        end, trajectory = run_steps(step, start, self.steps, self.trajectory_length)
        return SamplerResult(
            data=end,
            num_evaluations=jnp.int32(self.steps * self.method.stages),
            trajectory=trajectory,
        )


@dataclasses.dataclass(frozen=True)
class Adams(ProbabilityFlowODE):
    """Equal steps of an Adams method, as torchdiffeq's explicit_ and implicit_adams.

    Attributes:
      steps: how many.
      implicit: the explicit step is only a guess, corrected up to `corrections` times
        until two in a row agree to the tolerances everywhere.
      corrections: see implicit.
      rtol, atol: see implicit.
      reverse: from data to noise.
      trajectory_length: how many states on the way to keep.
    """

    steps: int = 50
    implicit: bool = False
    corrections: int = 4
    rtol: float = 1e-3
    atol: float = 1e-6
    reverse: bool = False
    trajectory_length: int = 0

    def __post_init__(self) -> None:
        check_ranges(self, steps=NUM_STEPS, trajectory_length=NUM_STATES)
        check_ranges(self, corrections=NUM_STEPS, rtol=TOLERANCE, atol=TOLERANCE)

    def solve(
        self, slope: Slope, start: PyTree[Array], t0: float, t1: float
    ) -> SamplerResult:
        """Follows a slope from a tree of arrays at t0 to t1."""
        times, dt = _time_grid(t0, t1, self.steps)
        predictor, corrector = (jnp.asarray(table) for table in _adams_tables())

        def runge_kutta_step(slopes: Any, known: Any, x: Any, i: Any) -> Any:
            begin = times[i]  # where the slope is known already
            here = jax.tree.map(lambda s: s[0], slopes)
            stage = lambda t, x: here if t is begin else slope(t, x)
            return rk4(stage, begin, dt[i], x), jnp.int32(rk4.stages - 1), known

        def adams_step(slopes: Any, known: Any, x: Any, i: Any) -> Any:
            move = weighted_sum(dt[i] * predictor[known - 1], slopes)
            if not self.implicit:
                return add_scaled(x, (1.0, move)), jnp.int32(0), known
            fixed = weighted_sum(dt[i] * corrector[known - 1, 1:], slopes)
            share = dt[i] * corrector[known - 1, 0]

            def correct(move: Any) -> Any:
                ahead = slope(times[i] + dt[i], add_scaled(x, (1.0, move)))
                return add_scaled(fixed, (share, ahead))

            move, count, agreed = self._correct_until_agreed(correct, move)
            # as torchdiffeq: the order does not rise where corrections disagree
            known = jnp.where(agreed, known, known - 1)
            return add_scaled(x, (1.0, move)), count, known

        def step(state: Any, i: Any) -> Any:
            x, slopes, known, count = state
            push = lambda old, new: jnp.concatenate([new[None], old[:-1]])
            slopes = jax.tree.map(push, slopes, slope(times[i], x))
            known = jnp.minimum(known + 1, MAX_SLOPES)
            x, more, known = jax.lax.cond(
                known <= NUM_STARTING_STEPS,
                runge_kutta_step,
                adams_step,
                *(slopes, known, x, i),
            )
            return x, slopes, known, count + 1 + more

        none = jax.tree.map(lambda x: jnp.zeros((MAX_SLOPES, *x.shape), x.dtype), start)
        begin = (start, none, jnp.int32(0), jnp.int32(0))
        (end, _, _, count), trajectory = run_steps(
            step, begin, self.steps, self.trajectory_length
        )
        return SamplerResult(
            data=end,
            num_evaluations=count,
            trajectory=None if trajectory is None else trajectory[0],
        )

    def _correct_until_agreed(self, correct: Callable, move: Any) -> tuple:
        """Repeats move = correct(move); returns move, how often, whether it agreed."""

        def disagree(old: Any, new: Any) -> Array:
            error = lambda a, b: (
                jnp.abs(a - b)
                / (self.atol + self.rtol * jnp.maximum(jnp.abs(a), jnp.abs(b)))
            )
            errors = jax.tree.leaves(jax.tree.map(error, old, new))
            return ~(jnp.max(jnp.stack([jnp.max(x) for x in errors])) < 1)

        go_on = lambda state: (state[2] < self.corrections) & disagree(*state[:2])
        once = lambda state: (state[1], correct(state[1]), state[2] + 1)
        begin = (move, correct(move), jnp.int32(1))
        old, move, count = jax.lax.while_loop(go_on, once, begin)
        return move, count, ~disagree(old, move)


def _time_grid(t0: float, t1: float, steps: int) -> tuple[Array, Array]:
    """Returns where each step begins, and its size, [steps]."""
    grid = np.linspace(t0, t1, steps + 1).astype(np.float32)
    return jnp.asarray(grid[:-1]), jnp.asarray(np.diff(grid))


def _adams_tables() -> tuple[np.ndarray, np.ndarray]:
    """Returns weights of slopes: predictor [n, n] and corrector [n, n + 1].

    Row i holds those of Adams-Bashforth with i + 1 slopes, newest first, and those of
    Adams-Moulton, which has the slope at the far end before them.
    """
    predictor = np.zeros((MAX_SLOPES, MAX_SLOPES), np.float32)
    corrector = np.zeros((MAX_SLOPES, MAX_SLOPES + 1), np.float32)
    for i in range(MAX_SLOPES):
        predictor[i, : i + 1] = _lagrange_integrals([-j for j in range(i + 1)])
        corrector[i, : i + 2] = _lagrange_integrals([1 - j for j in range(i + 2)])
    return predictor, corrector


def _lagrange_integrals(nodes: Sequence[int]) -> list[float]:
    """Returns integrals from 0 to 1 of the Lagrange polynomials of these nodes."""
    integrals = []
    for node in nodes:
        others = [other for other in nodes if other != node]
        scale = math.prod(node - other for other in others)
        integral = Polynomial.fromroots(others).integ()(1.0) if others else 1.0
        integrals.append(integral / scale)
    return integrals
