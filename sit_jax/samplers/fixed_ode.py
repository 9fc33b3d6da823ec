"""The probability-flow ODE on a fixed grid.

A sampler is sampler(draw, process, net, noise) -> (data, stats), all [B, H, W, C];
these are deterministic and never call draw. `solve` takes any tree of arrays, so that
one sampler's settings serve whatever follows the flow.

A method is one step, (slope, t, dt, x) -> x; to add one, write a function like heun.
The names are torchdiffeq's, so heun is its heun2 and rk4 the 3/8 rule.
"""

import dataclasses
from collections.abc import Callable
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.errors import UserError
from sit_jax.samplers.base import (
    add_scaled,
    check_steps,
    integrate_probability_flow,
    run_steps,
    weighted_sum,
)


def euler(slope, t, dt, x):
    return add_scaled(x, (dt, slope(t, x)))


def midpoint(slope, t, dt, x):
    return add_scaled(x, (dt, slope(t + dt / 2, add_scaled(x, (dt / 2, slope(t, x))))))


def heun(slope, t, dt, x):
    """The trapezoidal rule, with Euler's guess at the far end."""
    first = slope(t, x)
    second = slope(t + dt, add_scaled(x, (dt, first)))
    return add_scaled(x, (dt / 2, first), (dt / 2, second))


def heun3(slope, t, dt, x):
    """Heun's method of third order: stages at 0, 1/3 and 2/3."""
    first = slope(t, x)
    second = slope(t + dt / 3, add_scaled(x, (dt / 3, first)))
    third = slope(t + 2 * dt / 3, add_scaled(x, (2 * dt / 3, second)))
    return add_scaled(x, (dt / 4, first), (3 * dt / 4, third))


def rk4(slope, t, dt, x):
    """Kutta's 3/8 rule, which errs less than his better known method."""
    k1 = slope(t, x)
    k2 = slope(t + dt / 3, add_scaled(x, (dt / 3, k1)))
    k3 = slope(t + 2 * dt / 3, add_scaled(x, (dt, k2), (-dt / 3, k1)))
    k4 = slope(t + dt, add_scaled(x, (dt, k1), (-dt, k2), (dt, k3)))
    return add_scaled(x, (dt / 8, k1), (3 * dt / 8, k2), (3 * dt / 8, k3), (dt / 8, k4))


@dataclasses.dataclass(frozen=True)
class FixedStepODE:
    """`steps` equal steps of a method; reverse goes from data to noise.

    frames: states kept on the way, in stats["trajectory"] [frames, B, H, W, C].
    """

    method: Callable = heun
    steps: int = 50
    reverse: bool = False
    frames: int = 0

    def __post_init__(self):
        check_steps(self, self.steps)

    def __call__(self, draw, process, net, noise):
        return integrate_probability_flow(self, process, net, noise)

    def solve(self, slope, start, t0, t1):
        """start: tree of arrays at t0 -> (the tree at t1, stats)."""
        grid = np.linspace(t0, t1, self.steps + 1).astype(np.float32)
        at, dt = jnp.asarray(grid[:-1]), jnp.asarray(np.diff(grid))
        step = lambda x, i: self.method(slope, at[i], dt[i], x)
        end, stats = run_steps(step, start, self.steps, self.frames)
        count = self.steps * evaluations(self.method)
        return end, {"evaluations": jnp.int32(count), **stats}


def evaluations(method):
    """Evaluations in one step of a method: counted, so they need no declaring."""
    calls = []
    method(lambda t, x: calls.append(t) or x, 0.0, 1.0, 0.0)
    return len(calls)


RISING = 2  # steps before there are slopes enough
MOST = 11  # slopes kept


@dataclasses.dataclass(frozen=True)
class Adams:
    """`steps` equal steps; reverse goes from data to noise.

    implicit: the explicit step is only a guess, corrected up to `corrections` times
    until two in a row agree to the tolerances everywhere. frames: see FixedStepODE.
    """

    steps: int = 50
    implicit: bool = False
    corrections: int = 4
    rtol: float = 1e-3
    atol: float = 1e-6
    reverse: bool = False
    frames: int = 0

    def __post_init__(self):
        check_steps(self, self.steps)
        if self.corrections < 1:
            raise UserError(f"corrections={self.corrections}: give at least 1")
        for name in ("rtol", "atol"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)}: give 0 or more")

    def __call__(self, draw, process, net, noise):
        return integrate_probability_flow(self, process, net, noise)

    def solve(self, slope, start, t0, t1):
        """start: tree of arrays at t0 -> (the tree at t1, stats)."""
        grid = np.linspace(t0, t1, self.steps + 1).astype(np.float32)
        at, dt = jnp.asarray(grid[:-1]), jnp.asarray(np.diff(grid))
        guess, correct = (jnp.asarray(table) for table in _tables())

        def first(slopes, known, x, i):
            begin = at[i]  # where the slope is known already
            here = jax.tree.map(lambda s: s[0], slopes)
            stage = lambda t, x: here if t is begin else slope(t, x)
            return rk4(stage, begin, dt[i], x), jnp.int32(3), known

        def later(slopes, known, x, i):
            move = weighted_sum(dt[i] * guess[known - 1], slopes)
            if not self.implicit:
                return add_scaled(x, (1.0, move)), jnp.int32(0), known
            fixed = weighted_sum(dt[i] * correct[known - 1, 1:], slopes)
            share = dt[i] * correct[known - 1, 0]
            ahead = lambda move: slope(at[i] + dt[i], add_scaled(x, (1.0, move)))
            again = lambda move: add_scaled(fixed, (share, ahead(move)))
            move, made, agreed = self._corrected(again, move)
            # as torchdiffeq: the order does not rise where corrections disagree
            return add_scaled(x, (1.0, move)), made, jnp.where(agreed, known, known - 1)

        def step(state, i):
            x, slopes, known, count = state
            push = lambda old, new: jnp.concatenate([new[None], old[:-1]])
            slopes = jax.tree.map(push, slopes, slope(at[i], x))
            known = jnp.minimum(known + 1, MOST)
            x, more, known = jax.lax.cond(
                known <= RISING, first, later, slopes, known, x, i
            )
            return x, slopes, known, count + 1 + more

        none = jax.tree.map(lambda x: jnp.zeros((MOST, *x.shape), x.dtype), start)
        begin = (start, none, jnp.int32(0), jnp.int32(0))
        (end, _, _, count), stats = run_steps(step, begin, self.steps, self.frames)
        if self.frames:
            stats = {"trajectory": stats["trajectory"][0]}
        return end, {"evaluations": count, **stats}

    def _corrected(self, again, move):
        """Repeats move = again(move) -> move, how often, whether it settled."""

        def apart(old, new):
            wide = lambda a, b: (
                jnp.abs(a - b)
                / (self.atol + self.rtol * jnp.maximum(jnp.abs(a), jnp.abs(b)))
            )
            worst = [jnp.max(x) for x in jax.tree.leaves(jax.tree.map(wide, old, new))]
            return ~(jnp.max(jnp.stack(worst)) < 1)

        going = lambda state: (state[2] < self.corrections) & apart(*state[:2])
        once = lambda state: (state[1], again(state[1]), state[2] + 1)
        begin = (move, again(move), jnp.int32(1))
        old, move, count = jax.lax.while_loop(going, once, begin)
        return move, count, ~apart(old, move)


def _tables():
    """-> float32 [MOST, MOST] and [MOST, MOST + 1]: weights by the last slope's number.

    Row i holds those of Adams-Bashforth with i + 1 slopes, newest first, and those of
    Adams-Moulton, which has the slope at the far end before them.
    """
    guess = np.zeros((MOST, MOST), np.float32)
    correct = np.zeros((MOST, MOST + 1), np.float32)
    for i in range(MOST):
        guess[i, : i + 1] = _weights([-j for j in range(i + 1)])
        correct[i, : i + 2] = _weights([1 - j for j in range(i + 2)])
    return guess, correct


def _weights(places):
    """Integrals from 0 to 1 of the Lagrange polynomials of whole-numbered places."""
    found = []
    for here in places:
        powers = [Fraction(1)]  # of the polynomial, lowest first
        for other in (p for p in places if p != here):
            times_x = [Fraction(0), *powers]
            minus = [other * c for c in powers] + [Fraction(0)]
            powers = [
                (a - b) / (here - other) for a, b in zip(times_x, minus, strict=True)
            ]
        found.append(float(sum(c / (k + 1) for k, c in enumerate(powers))))
    return found
