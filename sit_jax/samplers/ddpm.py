"""A discrete process's chain from noise to data: DDPM and DDIM.

step_noise(0) is the noise of the first step taken, the one out of the noisiest index.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sit_jax.diffusion.gaussian import DenoisedFn, clip_denoised
from sit_jax.diffusion.paths import expand_dims_like
from sit_jax.diffusion.schedules import check_spacing
from sit_jax.errors import UserError
from sit_jax.samplers.base import (
    SamplerResult,
    check_trajectory_length,
    require_discrete,
    require_step_noise,
    run_steps,
)
from sit_jax.typing import Batch, Net, Process, StepNoise

Tables = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class DDPM:
    """The reverse chain with the process's own variance.

    Attributes:
      steps: a number, or any spacing of schedules.space_timesteps.
      clip: clips every guess at the data to [-1, 1], after denoised_fn.
      denoised_fn: applied to every guess at the data.
      cond_fn: (x, t) -> gradient of a classifier's log probability by x [b, h, w, c]
        (Dhariwal and Nichol, arXiv:2105.05233); t is the original step.
      trajectory_length: how many states on the way to keep.

    Source: Ho et al., arXiv:2006.11239, algorithm 2.
    """

    steps: int | tuple | Callable = 250
    clip: bool = False
    denoised_fn: Callable | None = None
    cond_fn: Callable | None = None
    trajectory_length: int = 0
    integrates_null_half: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_spacing(self.steps)
        check_trajectory_length(self.trajectory_length)

    def num_noise_draws(self, process: Process) -> int:
        """Returns how many steps of noise a run takes."""
        return require_discrete(self, process).respace(self.steps).num_timesteps

    def __call__(
        self,
        net: Net,
        process: Process,
        noise: Batch,
        step_noise: StepNoise | None = None,
    ) -> SamplerResult:
        """Turns noise [b, h, w, c] into data."""
        chain = require_discrete(self, process).respace(self.steps)
        noise_at = require_step_noise(self, step_noise)
        denoised_fn = _denoised_fn(self.denoised_fn, self.clip)
        timestep_map = jnp.asarray(chain.timestep_map)

        def step(x: Batch, i: Array, t: Array) -> Batch:
            times = jnp.full(x.shape[:1], t)  # (b,)
            mean, log_var, _ = chain.posterior(net, x, times, denoised_fn)
            if self.cond_fn is not None:
                mean += jnp.exp(log_var) * self.cond_fn(x, timestep_map[times])
            return mean + (t > 0) * jnp.exp(log_var / 2) * noise_at(i)

        return _run_chain(step, noise, chain.num_timesteps, self.trajectory_length)


@dataclasses.dataclass(frozen=True)
class DDIM:
    """Deterministic at eta = 0, with DDPM's variance at eta = 1.

    Attributes:
      steps: a number, or any spacing of schedules.space_timesteps; DDIMSpacing is the
        paper's.
      eta: share of fresh noise.
      reverse: from data to noise, with eta = 0.
      clip, denoised_fn, cond_fn, trajectory_length: see DDPM.

    Source: Song et al., arXiv:2010.02502, equation 12.
    """

    steps: int | tuple | Callable = 50
    eta: float = 0.0
    clip: bool = False
    denoised_fn: Callable | None = None
    cond_fn: Callable | None = None
    reverse: bool = False
    trajectory_length: int = 0
    integrates_null_half: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_spacing(self.steps)
        check_trajectory_length(self.trajectory_length)
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta={self.eta}: from 0, no fresh noise, to 1, DDPM's")
        if self.reverse and self.eta:
            raise UserError(f"eta={self.eta}: the way back to the noise needs eta=0")

    def num_noise_draws(self, process: Process) -> int:
        """Returns how many steps of noise a run takes, as the released loops draw."""
        return require_discrete(self, process).respace(self.steps).num_timesteps

    def __call__(
        self,
        net: Net,
        process: Process,
        noise: Batch,
        step_noise: StepNoise | None = None,
    ) -> SamplerResult:
        """Turns noise [b, h, w, c] into data, or the other way round."""
        chain = require_discrete(self, process).respace(self.steps)
        tables = self.reverse_weights(chain) if self.reverse else self.weights(chain)
        on_data, on_x, std = (jnp.asarray(table, jnp.float32) for table in tables)
        noise_at = require_step_noise(self, step_noise) if self.eta else None

        def step(x: Batch, i: Array, t: Array) -> Batch:
            data = self._guess_data(chain, net, x, jnp.full(x.shape[:1], t))
            fresh = std[t] * noise_at(i) if noise_at else 0.0
            return on_data[t] * data + on_x[t] * x + fresh

        return _run_chain(
            step,
            noise,
            chain.num_timesteps,
            self.trajectory_length,
            reverse=self.reverse,
        )

    def weights(self, process: Any) -> Tables:
        """Returns the weights of data, x and fresh noise in the next x, by index.

        float64. The next x holds as much noise as its index wants: `std` of it is
        fresh, the rest is what x held, found by taking the guessed data out of x.
        """
        t = np.arange(process.num_timesteps)
        alpha_prev, sigma_prev = process.float64_path(t - 1)
        alpha, sigma = process.float64_path(t)
        std = self.eta * sigma_prev / sigma * np.sqrt(process.betas)
        on_x = np.sqrt(sigma_prev**2 - std**2) / sigma
        return alpha_prev - alpha * on_x, on_x, std

    def reverse_weights(self, process: Any) -> Tables:
        """Returns the same for steps that make x noisier by one index."""
        alpha, sigma = process.float64_path(np.arange(process.num_timesteps))
        alpha_next, sigma_next = np.append(alpha[1:], 0.0), np.append(sigma[1:], 1.0)
        on_x = sigma_next / sigma
        return alpha_next - alpha * on_x, on_x, np.zeros_like(on_x)

    def _guess_data(self, process: Any, net: Net, x: Batch, t: Array) -> Batch:
        """Returns the network's guess at the data, moved where cond_fn leads."""
        denoised_fn = _denoised_fn(self.denoised_fn, self.clip)
        data = process.posterior(net, x, t, denoised_fn).data
        if self.cond_fn is None:
            return data
        tables = process.float64_path(np.arange(process.num_timesteps))
        alpha, sigma = (jnp.asarray(table, jnp.float32)[t] for table in tables)
        gradient = self.cond_fn(x, jnp.asarray(process.timestep_map)[t])
        return data + expand_dims_like(sigma**2 / alpha, x) * gradient


def _denoised_fn(denoised_fn: DenoisedFn | None, clip: bool) -> DenoisedFn | None:
    """Returns what is done to a guess at the data, in the originals' order."""
    if not clip or denoised_fn is None:
        return clip_denoised if clip else denoised_fn
    return lambda data: clip_denoised(denoised_fn(data))


def _run_chain(
    step: Callable[[Batch, Array, Array], Batch],
    noise: Batch,
    num_timesteps: int,
    trajectory_length: int,
    reverse: bool = False,
) -> SamplerResult:
    """Runs step(x, number of the step, its index t), from the noisiest index to 0."""
    index = (lambda i: i) if reverse else (lambda i: num_timesteps - 1 - i)
    data, trajectory = run_steps(
        lambda x, i: step(x, i, index(i)), noise, num_timesteps, trajectory_length
    )
    return SamplerResult(
        data=data, num_evaluations=jnp.int32(num_timesteps), trajectory=trajectory
    )
