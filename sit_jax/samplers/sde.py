"""The SDEs that share the marginals of the probability-flow ODE.

dx = (velocity + w score) dt + sqrt(2w) dB for any w(t) >= 0 (Ma et al.,
arXiv:2401.08740, whose w is twice this one; the released code's is this one).

Three choices are functions: a diffusion (path, t, norm) -> w, a method for one noisy
step, and a last step that noise would spoil.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.diffusion import predictions
from sit_jax.diffusion.paths import expand_dims_like, sde_diffusion_rate
from sit_jax.errors import UserError
from sit_jax.samplers.base import check_steps, require_continuous, run_steps


class SDEState(NamedTuple):
    """What one network call tells about x [B, H, W, C] at time t."""

    t: jax.Array
    x: jax.Array
    velocity: jax.Array
    score: jax.Array
    w: jax.Array

    @property
    def drift(self):
        return self.velocity + self.w * self.score


def diffusion_sigma(path, t, norm=1.0):
    return norm * path(t)[1]


def diffusion_sbdm(path, t, norm=1.0):
    """The reverse of the path's own noising SDE; SBDM in the released code."""
    return norm * sde_diffusion_rate(path, t)


def diffusion_constant(path, t, norm=1.0):
    return jnp.full_like(t, norm)


def diffusion_linear(path, t, norm=1.0):
    """In a line to 0; `linear` in the released code."""
    return norm * (1 - t)


def diffusion_decreasing(path, t, norm=1.0):
    """Along a cosine; with norm 1 from 1 to 0."""
    return (norm * jnp.cos(jnp.pi * t) + 1) ** 2 / 4


def diffusion_increasing_decreasing(path, t, norm=1.0):
    return norm * jnp.sin(jnp.pi * t) ** 2


def euler_maruyama(drift, t, dt, x, kick):
    return x + dt * drift(t, x) + kick


def heun(drift, t, dt, x, kick):
    """Noise first, then Heun's step of the drift."""
    x = x + kick
    first = drift(t, x)
    second = drift(t + dt, x + dt * first)
    # at t = 1 there is no score: there it is Euler's step
    return x + dt * jnp.where(t + dt < 1, (first + second) / 2, first)


def last_step_none(path, place, size):
    """Ends with the last noisy step."""
    return place.x


def last_step_mean(path, place, size):
    """A step of the drift without its noise."""
    return place.x + size * place.drift


def last_step_euler(path, place, size):
    """A step of the probability-flow ODE."""
    return place.x + size * place.velocity


def last_step_tweedie(path, place, size):
    """The expected data; reaches time 1 whatever the size."""
    alpha, sigma = path(place.t)
    return (place.x + sigma**2 * place.score) / alpha


@dataclasses.dataclass(frozen=True)
class SDE:
    """steps - 1 noisy steps up to time 1 - last, and one last step, as released.

    So 250 steps are 249 noisy ones of the same size and a last one of size 0.04. With
    last_step=none the 249 go on to where the process ends, and `last` has no effect.
    """

    steps: int = 250
    diffusion: Callable = diffusion_sigma
    norm: float = 1.0
    last_step: Callable = last_step_mean
    last: float = 0.04
    method: Callable = euler_maruyama
    frames: int = 0  # states kept on the way, in stats["trajectory"]

    def __post_init__(self):
        check_steps(self, self.steps, at_least=2)
        if not self.norm >= 0:
            raise UserError(f"norm={self.norm}: a diffusion cannot be negative")
        if not 0 < self.last < 1:
            raise UserError(
                f"last={self.last}: give a size between 0 and 1, or last_step=none"
            )

    def __call__(self, draw, process, net, noise):
        require_continuous(self, process)
        path, place = process.path, self._place(process, net)
        t0, t1 = self._span(process)
        grid = jnp.asarray(np.linspace(t0, t1, self.steps), jnp.float32)
        dt = (t1 - t0) / (self.steps - 1)

        def step(x, i):
            kick = jnp.sqrt(2 * dt * self._w(path, grid[i])) * draw(i)
            return self.method(lambda *at: place(*at).drift, grid[i], dt, x, kick)

        start = noise.astype(jnp.float32)
        x, stats = run_steps(step, start, self.steps - 1, self.frames)
        count = (self.steps - 1) * _calls(self.method)
        if self.last_step is not last_step_none:
            x, count = self.last_step(path, place(grid[-1], x), self.last), count + 1
            if self.frames:
                stats["trajectory"] = stats["trajectory"].at[-1].set(x)
        return x, {"evaluations": jnp.int32(count), **stats}

    def kicks(self, process):
        """How many draws of noise a run takes."""
        return self.steps - 1

    def _span(self, process):
        with jax.ensure_compile_time_eval():
            infinite = not jnp.isfinite(self._w(process.path, jnp.float32(0)))
        last = 0.0 if self.last_step is last_step_none else self.last
        return process.span(by_score=infinite, last=last)

    def _place(self, process, net):
        velocity = process.field(net, predictions.velocity)

        def place(t, x):
            path, at = process.path, jnp.full(x.shape[:1], t)
            v = velocity(x, at)
            score = predictions.convert(
                v,
                x,
                expand_dims_like(at, x),
                path,
                predictions.velocity,
                predictions.score,
            )
            return SDEState(t, x, v, score, self._w(path, t))

        return place

    def _w(self, path, t):
        return self.diffusion(path, t, self.norm)


def _calls(method):
    """Evaluations of the drift in one step of a method."""
    calls = []
    method(lambda t, x: calls.append(t) or x, 0.0, 1.0, 0.0, 0.0)
    return len(calls)
