"""The SDEs that share the marginals of the probability-flow ODE.

dx = (velocity + w score) dt + sqrt(2w) dB for any w(t) >= 0.

Three choices are functions: a diffusion form (path, t, norm) -> w, a method for one
noisy step, and a last step that noise would spoil.

Source: Ma et al., arXiv:2401.08740, whose w is twice this one; the released code's is
this one, and the names of forms and last steps are its.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sit_jax.diffusion import predictions
from sit_jax.diffusion.paths import expand_dims_like, sde_diffusion_rate
from sit_jax.errors import UserError
from sit_jax.ranges import AtLeast
from sit_jax.samplers.base import (
    NUM_STATES,
    SamplerResult,
    check_ranges,
    require_continuous,
    require_step_noise,
    run_steps,
)
from sit_jax.typing import (
    Batch,
    ContinuousProcess,
    NamedFunction,
    Net,
    Path,
    Process,
    StepNoise,
)

Scalar = Float[Array, ""]


class SDEState(NamedTuple):
    """What one evaluation of the network tells about x at time t."""

    t: Scalar
    x: Batch
    velocity: Batch
    score: Batch
    w: Scalar

    @property
    def drift(self) -> Batch:
        """The drift of the SDE."""
        return self.velocity + self.w * self.score


def diffusion_sigma(path: Path, t: Scalar, norm: float = 1.0) -> Scalar:
    """Returns norm * sigma(t)."""
    return norm * path(t)[1]


def diffusion_sbdm(path: Path, t: Scalar, norm: float = 1.0) -> Scalar:
    """Returns the diffusion of the reverse of the path's own SDE."""
    return norm * sde_diffusion_rate(path, t)


def diffusion_constant(path: Path, t: Scalar, norm: float = 1.0) -> Scalar:
    """Returns norm."""
    return jnp.full_like(t, norm)


def diffusion_linear(path: Path, t: Scalar, norm: float = 1.0) -> Scalar:
    """Returns norm * (1 - t)."""
    return norm * (1 - t)


def diffusion_decreasing(path: Path, t: Scalar, norm: float = 1.0) -> Scalar:
    """Returns a fall along a cosine; with norm 1 from 1 to 0."""
    return (norm * jnp.cos(jnp.pi * t) + 1) ** 2 / 4


def diffusion_increasing_decreasing(path: Path, t: Scalar, norm: float = 1.0) -> Scalar:
    """Returns norm * sin(pi t)^2."""
    return norm * jnp.sin(jnp.pi * t) ** 2


@dataclasses.dataclass(frozen=True, repr=False)
class SDEMethod(NamedFunction):
    """One step (drift, t, dt, x, noise) -> x; it evaluates the drift `stages` times."""

    stages: int = 1


@partial(SDEMethod, stages=1)
def euler_maruyama(drift: Callable, t: Any, dt: Any, x: Any, noise: Any) -> Any:
    """Euler's step of the drift, and noise."""
    return x + dt * drift(t, x) + noise


@partial(SDEMethod, stages=2)
def heun(drift: Callable, t: Any, dt: Any, x: Any, noise: Any) -> Any:
    """Noise first, then Heun's step of the drift."""
    x = x + noise
    k1 = drift(t, x)
    k2 = drift(t + dt, x + dt * k1)
    # at t = 1 there is no score: there it is Euler's step
    return x + dt * jnp.where(t + dt < 1, (k1 + k2) / 2, k1)


@dataclasses.dataclass(frozen=True, repr=False)
class LastStep(NamedFunction):
    """A step without noise (path, state, size) -> x, that ends sampling.

    Attributes:
      takes_time: False for a step that does nothing: noisy steps go on to the end.
    """

    takes_time: bool = True


@partial(LastStep, takes_time=False)
def last_step_none(path: Path, state: SDEState, size: float) -> Batch:
    """Ends with the last noisy step."""
    return state.x


@LastStep
def last_step_mean(path: Path, state: SDEState, size: float) -> Batch:
    """Takes a step of the drift without its noise."""
    return state.x + size * state.drift


@LastStep
def last_step_euler(path: Path, state: SDEState, size: float) -> Batch:
    """Takes a step of the probability-flow ODE."""
    return state.x + size * state.velocity


@LastStep
def last_step_tweedie(path: Path, state: SDEState, size: float) -> Batch:
    """Returns the expected data; reaches time 1 whatever the size."""
    alpha, sigma = path(state.t)
    return (state.x + sigma**2 * state.score) / alpha


@dataclasses.dataclass(frozen=True)
class SDE:
    """steps - 1 noisy steps up to time 1 - last, and one last step, as released.

    So 250 steps are 249 noisy ones of the same size and a last one of size 0.04. With
    last_step_none the 249 go on to where the process ends, and `last` has no effect.

    Attributes:
      steps: at least 2.
      diffusion: a form w(t) of this module.
      norm: factor of the form.
      last_step: a LastStep of this module.
      last: size of the last step.
      method: an SDEMethod of this module.
      trajectory_length: how many states on the way to keep.
    """

    steps: int = 250
    diffusion: Callable = diffusion_sigma
    norm: float = 1.0
    last_step: LastStep = last_step_mean
    last: float = 0.04
    method: SDEMethod = euler_maruyama
    trajectory_length: int = 0
    integrates_null_half: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_ranges(self, steps=AtLeast(2), trajectory_length=NUM_STATES)
        check_ranges(self, norm=AtLeast(0.0))
        if not 0 < self.last < 1:
            raise UserError(
                f"last={self.last}: give a size between 0 and 1, or last_step=none"
            )

    def num_noise_draws(self, process: Process) -> int:
        """Returns how many steps of noise a run takes."""
        return self.steps - 1

    def __call__(
        self,
        net: Net,
        process: Process,
        noise: Batch,
        step_noise: StepNoise | None = None,
    ) -> SamplerResult:
        """Turns noise [b, h, w, c] into data."""
        continuous = require_continuous(self, process)
        noise_at = require_step_noise(self, step_noise)
        path = continuous.path
        velocity_fn = continuous.prediction_fn(net, predictions.velocity)
        to_score = partial(predictions.convert, source=predictions.velocity)

        def state_at(t: Scalar, x: Batch) -> SDEState:
            times = jnp.full(x.shape[:1], t)  # (b,)
            velocity, full_t = velocity_fn(x, times), expand_dims_like(times, x)
            score = to_score(velocity, x, full_t, path, target=predictions.score)
            return SDEState(t, x, velocity, score, self.diffusion(path, t, self.norm))

        t0, t1 = self._time_interval(continuous)
        grid = jnp.asarray(np.linspace(t0, t1, self.steps), jnp.float32)
        dt = (t1 - t0) / (self.steps - 1)

        def step(x: Batch, i: Array) -> Batch:
            w = self.diffusion(path, grid[i], self.norm)
            increment = jnp.sqrt(2 * dt * w) * noise_at(i)
            drift = lambda t, x: state_at(t, x).drift
            return self.method(drift, grid[i], dt, x, increment)

        start, length = noise.astype(jnp.float32), self.trajectory_length
        x, trajectory = run_steps(step, start, self.steps - 1, length)
        count = (self.steps - 1) * self.method.stages
        if self.last_step.takes_time:
            x = self.last_step(path, state_at(grid[-1], x), self.last)
            count += 1
            if trajectory is not None:
                trajectory = trajectory.at[-1].set(x)
        return SamplerResult(
            data=x, num_evaluations=jnp.int32(count), trajectory=trajectory
        )

    def _time_interval(self, process: ContinuousProcess) -> tuple[float, float]:
        with jax.ensure_compile_time_eval():
            w = self.diffusion(process.path, jnp.float32(0), self.norm)
            is_infinite = bool(~jnp.isfinite(w))
        last_step = self.last if self.last_step.takes_time else 0.0
        return process.time_interval(by_score=is_infinite, last_step=last_step)
