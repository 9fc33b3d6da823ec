"""A diffusion's chain from noise to data, one kept step after the other.

A sampler is sampler(draw, process, net, noise) -> (data, stats), all [B, H, W, C].
draw(0) is the noise of the first step taken, the one out of the noisiest index.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from sit_jax.diffusion.gaussian import clip_denoised
from sit_jax.diffusion.paths import expand_dims_like
from sit_jax.diffusion.schedules import check_spacing
from sit_jax.errors import UserError
from sit_jax.samplers.base import check_trajectory_length, run_steps


@dataclasses.dataclass(frozen=True)
class DDPM:
    """DDPM's reverse chain with the process's own variance.

    steps: a number, or any spacing of schedules.kept_steps. mend: a function of the
    guess at the data, applied at every step. clip: that guess to [-1, 1] after it.
    lead: (x, t) -> gradient of a classifier's log probability with respect to x
    [B, H, W, C] (Dhariwal and Nichol, arXiv:2105.05233); t is the original step.
    frames: states kept on the way, in stats["trajectory"].
    """

    steps: int | tuple | Callable = 250
    clip: bool = False
    mend: Callable | None = None
    lead: Callable | None = None
    frames: int = 0

    def __post_init__(self):
        check_spacing(self.steps)
        check_trajectory_length(self.frames)

    def __call__(self, draw, process, net, noise):
        process = respaced_process(self, process)
        told = jnp.asarray(process.told)

        def step(x, i, t):
            at = jnp.full(x.shape[:1], t)
            mean, log_var, _ = process.posterior(net, x, at, _mended(self))
            if self.lead is not None:
                mean += jnp.exp(log_var) * self.lead(x, told[at])
            return mean + (t > 0) * jnp.exp(log_var / 2) * draw(i)

        return _descend(self, process, step, noise)

    def kicks(self, process):
        """How many draws of noise a run takes."""
        return len(respaced_process(self, process).betas)


@dataclasses.dataclass(frozen=True)
class DDIM:
    """Song et al. 2021, eq. 12: deterministic at eta = 0, DDPM's variance at eta = 1.

    steps: a number, or any spacing of schedules.kept_steps; DdimSpacing is the paper's.
    reverse goes from data to noise, with eta = 0. The others: see DDPM.
    """

    steps: int | tuple | Callable = 50
    eta: float = 0.0
    clip: bool = False
    mend: Callable | None = None
    lead: Callable | None = None
    reverse: bool = False
    frames: int = 0

    def __post_init__(self):
        check_spacing(self.steps)
        check_trajectory_length(self.frames)
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta={self.eta}: from 0, no fresh noise, to 1, DDPM's")
        if self.reverse and self.eta:
            raise UserError(f"eta={self.eta}: the way back to the noise needs eta=0")

    def __call__(self, draw, process, net, noise):
        process = respaced_process(self, process)
        tables = self.weights_back(process) if self.reverse else self.weights(process)
        on_data, on_x, std = (jnp.asarray(table, jnp.float32) for table in tables)

        def step(x, i, t):
            data = self._guess(process, net, x, jnp.full(x.shape[:1], t))
            kick = std[t] * draw(i) if self.eta else 0.0
            return on_data[t] * data + on_x[t] * x + kick

        return _descend(self, process, step, noise, self.reverse)

    def kicks(self, process):
        """How many draws of noise a run takes, as the released loops draw them."""
        return len(respaced_process(self, process).betas)

    def _guess(self, process, net, x, at):
        """The data that the network guesses, moved where the classifier leads."""
        data = process.posterior(net, x, at, _mended(self))[2]
        if self.lead is None:
            return data
        alpha, sigma = (jnp.asarray(w, jnp.float32)[at] for w in _levels(process))
        told = jnp.asarray(process.told)[at]
        return data + expand_dims_like(sigma**2 / alpha, x) * self.lead(x, told)

    def weights(self, process):
        """-> weights of data, x and fresh noise in the next x; float64, by index.

        The next x holds as much noise as its index wants: std of it is fresh, the
        rest is what x held, found by taking the guessed data out of x.
        """
        t = np.arange(len(process.betas))
        (alpha_, sigma_), (alpha, sigma) = process.levels(t - 1), process.levels(t)
        std = self.eta * sigma_ / sigma * np.sqrt(process.betas)
        on_x = np.sqrt(sigma_**2 - std**2) / sigma
        return alpha_ - alpha * on_x, on_x, std

    def weights_back(self, process):
        """The same for the step that makes x noisier by one index; no fresh noise."""
        (alpha, sigma), n = _levels(process), len(process.betas)
        alpha_, sigma_ = np.append(alpha[1:], 0.0), np.append(sigma[1:], 1.0)
        on_x = sigma_ / sigma
        return alpha_ - alpha * on_x, on_x, np.zeros(n)


def _mended(sampler):
    """-> what happens to the guess at the data."""
    steps = [f for f in (sampler.mend, clip_denoised if sampler.clip else None) if f]
    return lambda data: functools.reduce(lambda x, f: f(x), steps, data)


def _levels(process):
    return process.levels(np.arange(len(process.betas)))


def respaced_process(sampler, process):
    """The process with the sampler's steps; one that is no chain is refused."""
    if not hasattr(process, "posterior"):
        raise UserError(
            f"{type(sampler).__name__} samples a Diffusion; "
            f"{type(process).__name__} has no chain of steps: use FixedStepODE or SDE "
            "(--sampler heun, euler-maruyama)"
        )
    return process.respaced(sampler.steps)


def _descend(sampler, process, step, noise, reverse=False):
    """step(x, number of the step, its index t) from the noisiest index to 0."""
    n = len(process.betas)
    index = (lambda i: i) if reverse else (lambda i: n - 1 - i)
    walked = lambda x, i: step(x, i, index(i))
    data, stats = run_steps(walked, noise, n, sampler.frames)
    return data, {"evaluations": jnp.int32(n), **stats}
