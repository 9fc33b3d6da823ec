"""The probability-flow ODE on a fixed grid.

A sampler is sampler(draw, process, net, noise) -> (data, stats), all [B, H, W, C];
these are deterministic and never call draw. `solve` takes any tree of arrays, so that
one sampler's settings serve whatever follows the flow.

A method is one step, (slope, t, dt, x) -> x; to add one, write a function like heun.
The names are torchdiffeq's, so heun is its heun2 and rk4 the 3/8 rule.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from sit_jax.samplers.flow import add, flow
from sit_jax.samplers.walk import check_steps, walk


def euler(slope, t, dt, x):
    return add(x, (dt, slope(t, x)))


def midpoint(slope, t, dt, x):
    return add(x, (dt, slope(t + dt / 2, add(x, (dt / 2, slope(t, x))))))


def heun(slope, t, dt, x):
    """The trapezoidal rule, with Euler's guess at the far end."""
    first = slope(t, x)
    second = slope(t + dt, add(x, (dt, first)))
    return add(x, (dt / 2, first), (dt / 2, second))


def heun3(slope, t, dt, x):
    """Heun's method of third order: stages at 0, 1/3 and 2/3."""
    first = slope(t, x)
    second = slope(t + dt / 3, add(x, (dt / 3, first)))
    third = slope(t + 2 * dt / 3, add(x, (2 * dt / 3, second)))
    return add(x, (dt / 4, first), (3 * dt / 4, third))


def rk4(slope, t, dt, x):
    """Kutta's 3/8 rule, which errs less than his better known method."""
    k1 = slope(t, x)
    k2 = slope(t + dt / 3, add(x, (dt / 3, k1)))
    k3 = slope(t + 2 * dt / 3, add(x, (dt, k2), (-dt / 3, k1)))
    k4 = slope(t + dt, add(x, (dt, k1), (-dt, k2), (dt, k3)))
    return add(x, (dt / 8, k1), (3 * dt / 8, k2), (3 * dt / 8, k3), (dt / 8, k4))


@dataclasses.dataclass(frozen=True)
class Ode:
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
        return flow(self, process, net, noise)

    def solve(self, slope, start, t0, t1):
        """start: tree of arrays at t0 -> (the tree at t1, stats)."""
        grid = np.linspace(t0, t1, self.steps + 1).astype(np.float32)
        at, dt = jnp.asarray(grid[:-1]), jnp.asarray(np.diff(grid))
        step = lambda x, i: self.method(slope, at[i], dt[i], x)
        end, stats = walk(step, start, self.steps, self.frames)
        count = self.steps * evaluations(self.method)
        return end, {"evaluations": jnp.int32(count), **stats}


def evaluations(method):
    """Evaluations in one step of a method: counted, so they need no declaring."""
    calls = []
    method(lambda t, x: calls.append(t) or x, 0.0, 1.0, 0.0)
    return len(calls)
