"""Gaussian diffusion over discrete steps, as DiT and MDT train it.

Ho et al. 2020 (DDPM) with the learned variance and hybrid loss of Nichol and Dhariwal
2021. Step 0 is the least noisy one, and index -1 stands for clean data. All that
depends on the step is a float64 table, rounded to float32 only when gathered.

A variance is a function: (process, out, x, t) -> (guess, log variance); out is what the
network said, guess the part of it that `predicts` names. An objective is a function:
(process, batch, out) -> {"loss": [B], ...}.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.diffusion import predictions, schedules
from sit_jax.diffusion.paths import expand_dims_like, interpolate
from sit_jax.diffusion.schedules import posterior_coefficients
from sit_jax.errors import UserError


def clip_denoised(data):
    """To [-1, 1], where pixels are; latents do not want it."""
    return jnp.clip(data, -1, 1)


class NoisedBatch(NamedTuple):
    """data, noise and their mixture x [B, H, W, C] at steps t int [B, 1, 1, 1]."""

    data: jax.Array
    noise: jax.Array
    x: jax.Array
    t: jax.Array


def learned_range(process, out, x, t):
    """out [B, H, W, 2C]: its upper half places the log variance between two bounds."""
    _expect_channels(out, 2 * x.shape[-1], "learned_range", "learn_sigma=True")
    guess, v = jnp.split(out, 2, axis=-1)
    share = (v + 1) / 2  # not clamped, as released
    low, high = process.log_variances
    return guess, share * lookup(high, t) + (1 - share) * lookup(low, t)


def fixed_small(process, out, x, t):
    """The true posterior's variance: right if all data were one point."""
    _expect_channels(out, x.shape[-1], "fixed_small", "learn_sigma=False")
    return out, lookup(process.log_variances[0], t)


def fixed_large(process, out, x, t):
    """beta, right if data were white noise; at step 0 the posterior's variance."""
    _expect_channels(out, x.shape[-1], "fixed_large", "learn_sigma=False")
    low, high = process.log_variances
    return out, lookup(np.append(low[:1], high[1:]), t)


def hybrid_loss(process, batch, out, weight=1.0):
    """Squared error for the mean, the bound for the variance alone, if learned."""
    guess, log_var = process.variance(process, out, batch.x, batch.t)
    target = interpolate(process.target, batch.data, batch.noise, batch.t)
    mse = jnp.mean((target - guess) ** 2, axis=(1, 2, 3))
    if guess.shape == out.shape:
        return {"loss": mse, "mse": mse}
    vb = weight * process.bits(batch, jax.lax.stop_gradient(guess), log_var)
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def rescaled_hybrid_loss(process, batch, out):
    """hybrid with a bound that weighs the same whatever the number of steps."""
    return hybrid_loss(process, batch, out, weight=len(process.betas) / 1000)


def kl_loss(process, batch, out, weight=1.0):
    """The variational bound of one step, bits per dimension; trains mean and variance.

    The KL objective of the releases, without their unconditional rescaling.
    """
    guess, log_var = process.variance(process, out, batch.x, batch.t)
    vb = weight * process.bits(batch, guess, log_var)
    return {"loss": vb, "vb": vb}


def rescaled_kl_loss(process, batch, out):
    """bound times the number of steps: its mean over t estimates the whole bound."""
    return kl_loss(process, batch, out, weight=len(process.betas))


@dataclasses.dataclass(frozen=True)
class GaussianDiffusion:
    """A process with integer times; the defaults are the published DiT.

    predicts is predictions.noise, .data, .score or previous. kept: indices of the
    schedule's steps that are visited, None for all of them; see respaced.
    """

    schedule: Callable = schedules.linear_betas
    steps: int = 1000
    predicts: Callable = predictions.noise
    variance: Callable = learned_range
    objective: Callable = hybrid_loss
    kept: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.predicts is predictions.velocity:
            why = "integer times have no slope, so a Diffusion cannot predict velocity"
            raise UserError(f"{why}; use predictions.noise or an Interpolant")
        schedules.check_spacing(self.steps)
        schedules.check_betas(self.schedule(self.steps))
        schedules.check_use_timesteps(self.kept, self.steps)

    def times(self, key, n):
        return jax.random.randint(key, (n,), 0, len(self.betas))

    def loss(self, net, data, noise, t):
        """data, noise [B, H, W, C], t int [B] -> {"loss", "mse", "vb": [B]}."""
        at = expand_dims_like(t, data)
        batch = NoisedBatch(data, noise, interpolate(self.path, data, noise, at), at)
        return self.objective(self, batch, self._ask(net, batch.x, t))

    def posterior(self, net, x, t, mend=None):
        """x [B, H, W, C] at t int [B] -> mean and log variance of the x one step less
        noisy, and the guess at the data, after mend(data) if given."""
        at = expand_dims_like(t, x)
        guess, log_var = self.variance(self, self._ask(net, x, t), x, at)
        mean, data = self._step_back(guess, x, at, mend)
        return mean, log_var, data

    def progress(self, t):
        """Share of the way from noise to data, of what the network is told as t."""
        return 1 - t / max(self.steps - 1, 1)

    def respaced(self, steps):
        """The same process visiting only some steps: a number, sections or a rule.

        See schedules.kept_steps. The network is told the original step numbers.
        """
        here = schedules.space_timesteps(len(self.betas), steps)
        return dataclasses.replace(self, kept=tuple(self.told[i] for i in here))

    def bits(self, batch, guess, log_var, mend=None):
        """KL(true step || ours), at step 0 -log p(data); bits per dimension, [B]."""
        mean, _ = self._step_back(guess, batch.x, batch.t, mend)
        on_data, on_x, _ = (lookup(table, batch.t) for table in self.true_step)
        gap = lookup(self.log_variances[0], batch.t) - log_var
        miss = on_data * batch.data + on_x * batch.x - mean
        kl = (jnp.expm1(gap) - gap + miss**2 * jnp.exp(-log_var)) / 2
        nats = jnp.where(
            batch.t == 0,
            -discretized_gaussian_log_likelihood(batch.data, mean, log_var),
            kl,
        )
        return jnp.mean(nats, axis=(1, 2, 3)) / np.log(2.0)

    def bound_at(self, net, batch, t, mend=None):
        """-> bits per dimension of step t, [B], and the guess at the data."""
        out = self._ask(net, batch.x, t)
        guess, log_var = self.variance(self, out, batch.x, batch.t)
        _, data = self._step_back(guess, batch.x, batch.t, mend)
        return self.bits(batch, guess, log_var, mend), data

    def prior_bits(self, data):
        """KL(q(noisiest x) || N(0, 1)); bits per dimension, [B]."""
        (alpha,), (sigma,) = self.levels(np.array([len(self.betas) - 1]))
        spread = np.log(1 / sigma**2) + sigma**2 - 1
        kl = (spread + jnp.mean((alpha * data) ** 2, axis=(1, 2, 3))) / 2
        return kl / np.log(2.0)

    def path(self, t):
        """t int -> (alpha, sigma), float32; t = -1 is clean data."""
        levels = self.levels(np.arange(-1, len(self.betas)))
        return tuple(lookup(level, t + 1) for level in levels)

    def target(self, t):
        """t int -> (p, q) of what the network predicts: p * data + q * noise."""
        p, q = self.predicts(self.levels, np.arange(len(self.betas)))
        return lookup(p, t), lookup(q, t)

    def levels(self, t):
        """t int array -> (alpha, sigma), numpy float64; t = -1 is clean data."""
        alpha_bar = self.alpha_bar[t + 1]
        return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)

    @property
    def end(self):
        """What times lie below."""
        return len(self.betas)

    @functools.cached_property
    def told(self):
        """What the network is told at each step: its number in the full schedule."""
        return tuple(range(self.steps)) if self.kept is None else self.kept

    @functools.cached_property
    def betas(self):
        """float64 [number of kept steps]; each leads from one kept step to the next."""
        alpha_bar = np.cumprod(1 - self.schedule(self.steps))[list(self.told)]
        return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])

    @functools.cached_property
    def alpha_bar(self):
        """Share of data in the variance at t = -1, 0, ..."""
        return np.append(1.0, np.cumprod(1 - self.betas))

    @functools.cached_property
    def true_step(self):
        """Weight of data, weight of x_t and variance of q(x_{t-1} | x_t, data)."""
        return posterior_coefficients(
            self.betas, self.alpha_bar[:-1], self.alpha_bar[1:]
        )

    @functools.cached_property
    def log_variances(self):
        """Log of the smallest (the true step's) and the largest variance (beta)."""
        var = self.true_step[2]
        # var[0] is zero; the next one stands in, beta where there is no next
        first = var[1] if len(var) > 1 else self.betas[0]
        return np.log(np.append(first, var[1:])), np.log(self.betas)

    def _ask(self, net, x, t):
        out = net(x, lookup(self.told, t, jnp.int32))
        return out.astype(x.dtype)  # the network may use fewer bits, the process not

    def _step_back(self, guess, x, t, mend=None):
        """-> mean of x_{t-1} given x_t and the network's guess, and the data guess."""
        alpha, sigma = self.levels(np.arange(len(self.betas)))
        p, q = self.predicts(self.levels, np.arange(len(self.betas)))
        det = alpha * q - sigma * p  # solved in float64: alpha is small at the end
        data = lookup(q / det, t) * x - lookup(sigma / det, t) * guess
        data = mend(data) if mend else data
        on_data, on_x, _ = (lookup(table, t) for table in self.true_step)
        return on_data * data + on_x * x, data


def _expect_channels(out, wanted, variance, remedy):
    if out.shape[-1] != wanted:
        raise UserError(
            f"variance={variance} needs {wanted} output channels, the network has "
            f"{out.shape[-1]}; use a model with {remedy} or another variance"
        )


def lookup(table, t, dtype=jnp.float32):
    """A float64 table, or one number, at steps t; rounded after all else is done."""
    table = np.asarray(table, dtype)
    return jnp.asarray(table)[t] if table.ndim else table


def discretized_gaussian_log_likelihood(x, mean, log_var, half=1 / 255):
    """Log mass a Gaussian puts on the bin, an 8-bit step wide, around x in [-1, 1].

    Latents have no such bins, but the published variances were trained with them. The
    normal distribution function is Page's of 1977, 1/2 + tanh/2. Written as a sigmoid,
    and on the lower side of the mean, it keeps its digits where the bin is far away.
    """
    cdf = lambda z: jax.nn.sigmoid(np.sqrt(8 / np.pi) * (z + 0.044715 * z**3))
    far, std = jnp.abs(x - mean), jnp.exp(log_var / 2)
    inner = cdf((half - far) / std) - cdf((-half - far) / std)
    first, last = cdf((x - mean + half) / std), cdf((mean - x + half) / std)
    mass = jnp.where(x < -0.999, first, jnp.where(x > 0.999, last, inner))
    return jnp.log(jnp.maximum(mass, 1e-12))
