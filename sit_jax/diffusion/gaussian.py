"""Gaussian diffusion over discrete steps, as DiT and MDT train it.

q(x_t | data) = N(sqrt(alpha_bar_t) * data, 1 - alpha_bar_t). Step 0 is the least noisy
one, and index -1 stands for clean data. All that depends on the step is a float64
table, rounded to float32 only when it is looked up.

A variance is a function (process, out, x, t) -> (prediction, log variance), where `out`
is the network's output. A loss function is (process, batch, out) -> {"loss": [b], ...}.

Sources: Ho et al., arXiv:2006.11239 (DDPM); Nichol and Dhariwal, arXiv:2102.09672
(learned variance, hybrid loss).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sit_jax.diffusion import predictions, schedules
from sit_jax.diffusion.paths import expand_dims_like, interpolate
from sit_jax.errors import UserError
from sit_jax.typing import Batch, Net, PerImage

DenoisedFn = Callable[[Batch], Batch]  # applied to every guess at the data


class NoisyBatch(NamedTuple):
    """data, noise and their mixture x at steps t."""

    data: Batch
    noise: Batch
    x: Batch
    t: Int[Array, "b 1 1 1"]


class Posterior(NamedTuple):
    """The network's p(x_{t-1} | x_t), and its guess at the data."""

    mean: Batch
    log_variance: Batch
    data: Batch


def clip_denoised(data: Batch) -> Batch:
    """Clips to [-1, 1], where pixels are; latents do not want it."""
    return jnp.clip(data, -1, 1)


def learned_range(
    process: "GaussianDiffusion", out: Float[Array, "b h w 2*c"], x: Batch, t: Any
) -> tuple[Batch, Batch]:
    """Lets the upper half of the channels place log variance between its two bounds.

    Source: Nichol and Dhariwal, arXiv:2102.09672, equation 15.
    """
    _check_channels(out, x, variance="learned_range", learn_sigma=True)
    prediction, v = jnp.split(out, 2, axis=-1)
    share = (v + 1) / 2  # not clamped, as released
    low, high = process.log_variances
    return prediction, share * lookup(high, t) + (1 - share) * lookup(low, t)


def fixed_small(
    process: "GaussianDiffusion", out: Batch, x: Batch, t: Any
) -> tuple[Batch, Batch]:
    """Uses the true posterior's variance, right if all data were one point."""
    _check_channels(out, x, variance="fixed_small", learn_sigma=False)
    return out, lookup(process.log_variances[0], t)


def fixed_large(
    process: "GaussianDiffusion", out: Batch, x: Batch, t: Any
) -> tuple[Batch, Batch]:
    """Uses beta, right if data were white noise; at step 0 the posterior's variance."""
    _check_channels(out, x, variance="fixed_large", learn_sigma=False)
    low, high = process.log_variances
    return out, lookup(np.append(low[:1], high[1:]), t)


def hybrid_loss(
    process: "GaussianDiffusion", batch: NoisyBatch, out: Array, weight: float = 1.0
) -> dict[str, PerImage]:
    """Returns squared error for the mean, plus the bound for a learned variance alone.

    Source: Nichol and Dhariwal, arXiv:2102.09672, equation 16.
    """
    prediction, log_var = process.variance(process, out, batch.x, batch.t)
    target = interpolate(process.target_weights, batch.data, batch.noise, batch.t)
    mse = jnp.mean((target - prediction) ** 2, axis=(1, 2, 3))
    if prediction.shape == out.shape:
        return {"loss": mse, "mse": mse}
    frozen_mean = jax.lax.stop_gradient(prediction)
    vb = weight * process.vb_terms(batch, frozen_mean, log_var)[0]
    return {"loss": mse + vb, "mse": mse, "vb": vb}


def rescaled_hybrid_loss(
    process: "GaussianDiffusion", batch: NoisyBatch, out: Array
) -> dict[str, PerImage]:
    """Returns hybrid_loss with a bound that weighs the same for any number of steps."""
    return hybrid_loss(process, batch, out, weight=process.num_timesteps / 1000)


def kl_loss(
    process: "GaussianDiffusion", batch: NoisyBatch, out: Array, weight: float = 1.0
) -> dict[str, PerImage]:
    """Returns the variational bound of one step; it trains mean and variance.

    The KL objective of the releases, without their unconditional rescaling.
    """
    prediction, log_var = process.variance(process, out, batch.x, batch.t)
    vb = weight * process.vb_terms(batch, prediction, log_var)[0]
    return {"loss": vb, "vb": vb}


def rescaled_kl_loss(
    process: "GaussianDiffusion", batch: NoisyBatch, out: Array
) -> dict[str, PerImage]:
    """Returns kl_loss times the number of steps: its mean estimates the whole bound."""
    return kl_loss(process, batch, out, weight=process.num_timesteps)


@dataclasses.dataclass(frozen=True)
class GaussianDiffusion:
    """A process with integer times; the defaults are the published DiT.

    Attributes:
      schedule: a function: number of steps -> betas, float64.
      steps: of the full schedule.
      prediction: noise, data or score of predictions.
      variance: learned_range, fixed_small or fixed_large.
      objective: the loss, a function (process, batch, out) -> {"loss": [b], ...}.
      use_timesteps: the steps of the schedule that are visited; None: all. See respace.
    """

    schedule: Callable = schedules.linear_betas
    steps: int = 1000
    prediction: predictions.Prediction = predictions.noise
    variance: Callable = learned_range
    objective: Callable = hybrid_loss
    use_timesteps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.prediction.needs_derivatives:
            raise UserError(
                "integer times have no derivative, so a GaussianDiffusion cannot "
                "predict velocity; use predictions.noise or an Interpolant"
            )
        schedules.check_spacing(self.steps)
        schedules.check_betas(self.schedule(self.steps))
        visited = self.use_timesteps
        ascending = sorted(set(visited or ()) & set(range(self.steps)))
        if visited is not None and not (visited and list(visited) == ascending):
            raise UserError(
                f"use_timesteps={visited} must be ascending step numbers from 0 to "
                f"{self.steps - 1}; leave it None and use respace(number of steps)"
            )

    def sample_times(self, key: Array, n: int) -> Int[Array, " n"]:
        """Returns n steps, uniform over those that are visited."""
        return jax.random.randint(key, (n,), 0, self.num_timesteps)

    def losses(
        self, net: Net, data: Batch, noise: Batch, t: Int[Array, " b"]
    ) -> dict[str, PerImage]:
        """Returns {"loss", "mse", "vb": [b]}; "vb" in bits per dimension."""
        t_full = expand_dims_like(t, data)  # (b, 1, 1, 1)
        x = interpolate(self.path, data, noise, t_full)
        return self.objective(
            self, NoisyBatch(data, noise, x, t_full), self._apply(net, x, t)
        )

    def posterior(
        self,
        net: Net,
        x: Batch,
        t: Int[Array, " b"],
        denoised_fn: DenoisedFn | None = None,
    ) -> Posterior:
        """Returns the distribution of the x one step less noisy.

        Args:
          net: asked at the original step numbers.
          x: at steps t.
          t: of this (perhaps respaced) process.
          denoised_fn: applied to the guess at the data.
        """
        t_full = expand_dims_like(t, x)
        prediction, log_var = self.variance(self, self._apply(net, x, t), x, t_full)
        mean, data = self._posterior_mean(prediction, x, t_full, denoised_fn)
        return Posterior(mean, log_var, data)

    def progress(self, t: Array) -> Array:
        """Returns the share of the way from noise to data, of original step numbers."""
        return 1 - t / max(self.steps - 1, 1)

    def respace(self, steps: schedules.Spacing) -> "GaussianDiffusion":
        """Returns the same process, visiting only some of its steps.

        Args:
          steps: a number, sections or a rule, see schedules.space_timesteps.
        """
        indices = schedules.space_timesteps(self.num_timesteps, steps)
        use_timesteps = tuple(self.timestep_map[i] for i in indices)
        return dataclasses.replace(self, use_timesteps=use_timesteps)

    def vb_terms(
        self,
        batch: NoisyBatch,
        prediction: Batch,
        log_var: Batch,
        denoised_fn: DenoisedFn | None = None,
    ) -> tuple[PerImage, Batch]:
        """Returns KL(true posterior || ours), at step 0 -log p(data), and our data.

        The first is in bits per dimension, [b]; the second is the guess at the data.

        Source: Ho et al., arXiv:2006.11239, equation 5.
        """
        mean, data = self._posterior_mean(prediction, batch.x, batch.t, denoised_fn)
        on_data, on_x, _ = (lookup(table, batch.t) for table in self.q_posterior)
        gap = lookup(self.log_variances[0], batch.t) - log_var
        error = on_data * batch.data + on_x * batch.x - mean
        kl = (jnp.expm1(gap) - gap + error**2 * jnp.exp(-log_var)) / 2
        decoder = discretized_gaussian_log_likelihood(batch.data, mean, log_var)
        nats = jnp.where(batch.t == 0, -decoder, kl)
        return jnp.mean(nats, axis=(1, 2, 3)) / np.log(2.0), data

    def vb_terms_of(
        self, net: Net, batch: NoisyBatch, denoised_fn: DenoisedFn | None = None
    ) -> tuple[PerImage, Batch]:
        """Returns vb_terms of a network."""
        out = self._apply(net, batch.x, batch.t[:, 0, 0, 0])
        prediction, log_var = self.variance(self, out, batch.x, batch.t)
        return self.vb_terms(batch, prediction, log_var, denoised_fn)

    def prior_vb(self, data: Batch) -> PerImage:
        """Returns KL(q(noisiest x) || N(0, 1)) in bits per dimension."""
        (alpha,), (sigma,) = self.float64_path(np.array([self.num_timesteps - 1]))
        spread = np.log(1 / sigma**2) + sigma**2 - 1
        kl = (spread + jnp.mean((alpha * data) ** 2, axis=(1, 2, 3))) / 2
        return kl / np.log(2.0)

    def path(self, t: Int[Array, "..."]) -> tuple[Array, Array]:
        """Returns alpha and sigma in float32; t = -1 is clean data."""
        tables = self.float64_path(np.arange(-1, self.num_timesteps))
        return lookup(tables[0], t + 1), lookup(tables[1], t + 1)

    def target_weights(self, t: Int[Array, "..."]) -> tuple[Array, Array]:
        """Returns (p, q) of the network's target p * data + q * noise."""
        steps = np.arange(self.num_timesteps)
        p, q = self.prediction.weights(self.float64_path, steps)
        return lookup(p, t), lookup(q, t)

    def float64_path(self, t: Any) -> tuple[np.ndarray, np.ndarray]:
        """Returns alpha and sigma as numpy float64; t = -1 is clean data."""
        alpha_bar = self.alpha_bar[t + 1]
        return np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)

    @property
    def num_timesteps(self) -> int:
        """How many steps are visited."""
        return len(self.betas)

    @property
    def max_time(self) -> int:
        """The bound that all times lie below."""
        return self.num_timesteps

    @functools.cached_property
    def timestep_map(self) -> tuple[int, ...]:
        """The number in the full schedule of each step, which the network is told."""
        return self.use_timesteps or tuple(range(self.steps))

    @functools.cached_property
    def betas(self) -> np.ndarray:
        """float64 [num_timesteps]; each leads from one visited step to the next."""
        alpha_bar = np.cumprod(1 - self.schedule(self.steps))[list(self.timestep_map)]
        return 1 - alpha_bar / np.append(1.0, alpha_bar[:-1])

    @functools.cached_property
    def alpha_bar(self) -> np.ndarray:
        """float64, the share of data in the variance at t = -1, 0, ..."""
        return np.append(1.0, np.cumprod(1 - self.betas))

    @functools.cached_property
    def q_posterior(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weight of data, weight of x_t and variance of q(x_{t-1} | x_t, data).

        Source: Ho et al., arXiv:2006.11239, equation 7.
        """
        beta, before, after = self.betas, self.alpha_bar[:-1], self.alpha_bar[1:]
        on_data = beta * np.sqrt(before) / (1 - after)
        on_x = (1 - before) * np.sqrt(1 - beta) / (1 - after)
        return on_data, on_x, beta * (1 - before) / (1 - after)

    @functools.cached_property
    def log_variances(self) -> tuple[np.ndarray, np.ndarray]:
        """Log of the smallest variance (the posterior's) and of the largest (beta)."""
        var = self.q_posterior[2]
        # var[0] is zero; the next one stands in, beta where there is no next
        first = var[1] if len(var) > 1 else self.betas[0]
        return np.log(np.append(first, var[1:])), np.log(self.betas)

    def _apply(self, net: Net, x: Batch, t: Int[Array, " b"]) -> Array:
        out = net(x, lookup(self.timestep_map, t, jnp.int32))
        return out.astype(x.dtype)  # the network may use fewer bits, the process not

    def _posterior_mean(
        self, prediction: Batch, x: Batch, t: Any, denoised_fn: DenoisedFn | None
    ) -> tuple[Batch, Batch]:
        """Returns the mean of x_{t-1}, and the guess at the data."""
        steps = np.arange(self.num_timesteps)
        alpha, sigma = self.float64_path(steps)
        p, q = self.prediction.weights(self.float64_path, steps)
        det = alpha * q - sigma * p  # solved in float64: alpha is small at the end
        data = lookup(q / det, t) * x - lookup(sigma / det, t) * prediction
        data = denoised_fn(data) if denoised_fn else data
        on_data, on_x, _ = (lookup(table, t) for table in self.q_posterior)
        return on_data * data + on_x * x, data


def lookup(table: Any, t: Array, dtype: Any = jnp.float32) -> Array:
    """Returns the entries t of a float64 table, or one number; rounded last of all."""
    table = np.asarray(table, dtype)
    return jnp.asarray(table)[t] if table.ndim else table


def discretized_gaussian_log_likelihood(
    x: Batch, mean: Batch, log_var: Batch, half_bin: float = 1 / 255
) -> Batch:
    """Returns the log mass a Gaussian puts on the 8-bit bin around x in [-1, 1].

    Latents have no such bins, but the published variances were trained with them. The
    normal distribution function is Page's of 1977, 1/2 + tanh/2. Written as a sigmoid,
    and on the lower side of the mean, it keeps its digits where the bin is far away.

    Source: Ho et al., arXiv:2006.11239, equation 13.
    """
    cdf = lambda z: jax.nn.sigmoid(np.sqrt(8 / np.pi) * (z + 0.044715 * z**3))
    distance, std = jnp.abs(x - mean), jnp.exp(log_var / 2)
    inner = cdf((half_bin - distance) / std) - cdf((-half_bin - distance) / std)
    first, last = cdf((x - mean + half_bin) / std), cdf((mean - x + half_bin) / std)
    mass = jnp.where(x < -0.999, first, jnp.where(x > 0.999, last, inner))
    return jnp.log(jnp.maximum(mass, 1e-12))


def _check_channels(out: Array, x: Batch, variance: str, learn_sigma: bool) -> None:
    channels = x.shape[-1] * (2 if learn_sigma else 1)
    if out.shape[-1] != channels:
        raise UserError(
            f"variance={variance} needs {channels} output channels, the network has "
            f"{out.shape[-1]}; use a model with {learn_sigma=} or another variance"
        )
