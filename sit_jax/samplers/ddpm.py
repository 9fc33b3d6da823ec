"""A discrete process's chain from noise to data: DDPM and DDIM.

step_noise(0) is the noise of the first step taken, the one out of the noisiest index.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from sit_jax.diffusion.gaussian import clip_denoised
from sit_jax.diffusion.paths import expand_dims_like
from sit_jax.diffusion.schedules import check_spacing
from sit_jax.errors import UserError
from sit_jax.ranges import Between
from sit_jax.samplers.base import (
    NUM_STATES,
    SamplerResult,
    check_ranges,
    require_discrete,
    require_step_noise,
    run_steps,
)
from sit_jax.typing import Batch, Net, Process, StepNoise

Tables = tuple[np.ndarray, np.ndarray, np.ndarray]
Step = Callable[[Batch, Array], Batch]


@dataclasses.dataclass(frozen=True)
class ChainSampler(abc.ABC):
    """Goes through a process's chain; a subclass says how one step is made.

    Attributes:
      steps: a number, or any spacing of schedules.space_timesteps.
      clip: clips every guess at the data to [-1, 1], after denoised_fn.
      denoised_fn: applied to every guess at the data.
      cond_fn: (x, t) -> gradient of a classifier's log probability by x [b, h, w, c]
        (Dhariwal and Nichol, arXiv:2105.05233); t is the original step.
      trajectory_length: how many states on the way to keep.
    """

    steps: int | tuple | Callable = 250
    clip: bool = False
    denoised_fn: Callable | None = None
    cond_fn: Callable | None = None
    trajectory_length: int = 0
    integrates_null_half: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_spacing(self.steps)
        check_ranges(self, trajectory_length=NUM_STATES)

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
        step, count = self._make_step(chain, net, step_noise), chain.num_timesteps
        data, trajectory = run_steps(step, noise, count, self.trajectory_length)
        return SamplerResult(
            data=data, num_evaluations=jnp.int32(count), trajectory=trajectory
        )

    @abc.abstractmethod
    def _make_step(self, chain: Any, net: Net, step_noise: StepNoise | None) -> Step:
        """Returns the function (x, number of the step) -> next x."""

    def _mend_guess(self, data: Batch) -> Batch:
        """Changes a guess at the data, in the originals' order."""
        data = data if self.denoised_fn is None else self.denoised_fn(data)
        return clip_denoised(data) if self.clip else data


@dataclasses.dataclass(frozen=True)
class DDPM(ChainSampler):
    """The reverse chain with the process's own variance.

    Source: Ho et al., arXiv:2006.11239, algorithm 2.
    """

    def _make_step(self, chain: Any, net: Net, step_noise: StepNoise | None) -> Step:
        noise_at = require_step_noise(self, step_noise)
        timestep_map = jnp.asarray(chain.timestep_map)

        def step(x: Batch, i: Array) -> Batch:
            t = chain.num_timesteps - 1 - i
            times = jnp.full(x.shape[:1], t)  # (b,)
            mean, log_var, _ = chain.posterior(net, x, times, self._mend_guess)
            if self.cond_fn is not None:
                mean += jnp.exp(log_var) * self.cond_fn(x, timestep_map[times])
            return mean + (t > 0) * jnp.exp(log_var / 2) * noise_at(i)

        return step


@dataclasses.dataclass(frozen=True)
class DDIM(ChainSampler):
    """Deterministic at eta = 0, with DDPM's variance at eta = 1.

    Attributes:
      steps: see ChainSampler; DDIMSpacing is the paper's spacing.
      eta: share of fresh noise.
      reverse: from data to noise, with eta = 0.

    Source: Song et al., arXiv:2010.02502, equation 12.
    """

    steps: int | tuple | Callable = 50
    eta: float = 0.0
    reverse: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, eta=Between(0.0, 1.0))
        if self.reverse and self.eta:
            raise UserError(f"eta={self.eta}: the way back to the noise needs eta=0")

    def _make_step(self, chain: Any, net: Net, step_noise: StepNoise | None) -> Step:
        tables = self.reverse_weights(chain) if self.reverse else self.weights(chain)
        on_data, on_x, std = (jnp.asarray(table, jnp.float32) for table in tables)
        noise_at = require_step_noise(self, step_noise) if self.eta else None

        def step(x: Batch, i: Array) -> Batch:
            t = i if self.reverse else chain.num_timesteps - 1 - i
            data = self._guess_data(chain, net, x, jnp.full(x.shape[:1], t))
            fresh = std[t] * noise_at(i) if noise_at else 0.0
            return on_data[t] * data + on_x[t] * x + fresh

        return step

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
        data = process.posterior(net, x, t, self._mend_guess).data
        if self.cond_fn is None:
            return data
        tables = process.float64_path(np.arange(process.num_timesteps))
        alpha, sigma = (jnp.asarray(table, jnp.float32)[t] for table in tables)
        gradient = self.cond_fn(x, jnp.asarray(process.timestep_map)[t])
        return data + expand_dims_like(sigma**2 / alpha, x) * gradient
