"""How probable data are to a model.

For a continuous process exactly, by the flow's change of variables: log p(data) =
log p(noise) + the integral of the divergence along the way, noise standard normal. For
a discrete process by the variational bound, every step of the chain.

Sources: Song et al., arXiv:2011.13456, appendix D.2; Ho et al., arXiv:2006.11239.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sit_jax.diffusion import predictions
from sit_jax.diffusion.gaussian import NoisyBatch, clip_denoised
from sit_jax.diffusion.paths import expand_dims_like, interpolate
from sit_jax.errors import UserError
from sit_jax.samplers.adaptive_ode import AdaptiveODE
from sit_jax.samplers.base import require_continuous, require_discrete
from sit_jax.typing import Batch, Net, ODESampler, PerImage, Process, StepNoise


@dataclasses.dataclass(frozen=True)
class FlowLikelihoodResult:
    """Log likelihoods in nats, the noise that data became, and solver counts."""

    nats: PerImage
    noise: Batch
    num_evaluations: Int[Array, "..."]
    finished: Bool[Array, "..."] | None


@dataclasses.dataclass(frozen=True)
class VariationalBoundResult:
    """A bound of the log likelihood in nats, and its parts in bits per dimension.

    Steps are from the noisiest on.
    """

    nats: PerImage
    prior_vb: PerImage
    vb: Float[Array, "steps b"]
    data_mse: Float[Array, "steps b"]
    noise_mse: Float[Array, "steps b"]
    num_evaluations: Int[Array, ""]


for _result in (FlowLikelihoodResult, VariationalBoundResult):
    jax.tree_util.register_dataclass(_result)


def hutchinson_trace(probes: Float[Array, "k b h w c"], vjp: Callable) -> PerImage:
    """Estimates the trace of a Jacobian from probes of +-1 (Hutchinson 1990)."""
    one = lambda probe: _sum_per_image(probe * vjp(probe)[0])
    return jnp.mean(jax.lax.map(one, probes), axis=0)


def exact_trace(probes: Float[Array, "k b h w c"], vjp: Callable) -> PerImage:
    """Returns the whole trace, one pass for each dimension; probes give the shape."""
    _, rows, *shape = probes.shape
    size = int(np.prod(shape))

    def add_entry(total: PerImage, i: Array) -> tuple[PerImage, None]:
        unit = (jnp.arange(size) == i).astype(jnp.float32).reshape(shape)
        unit = jnp.broadcast_to(unit, (rows, *shape))
        return total + _sum_per_image(unit * vjp(unit)[0]), None

    return jax.lax.scan(add_entry, jnp.zeros(rows), jnp.arange(size))[0]


@dataclasses.dataclass(frozen=True)
class FlowLikelihood:
    """Log density under the flow.

    Attributes:
      ode: a FixedStepODE, Adams or AdaptiveODE, whose direction is ignored.
      trace: hutchinson_trace or exact_trace.
      num_probes: directions averaged over, the same all along the way.
      fresh_probes: new ones at every time, as released, which an adaptive solver can
        hardly follow.
    """

    ode: Any = AdaptiveODE(rtol=1e-5, atol=1e-5)
    trace: Callable = hutchinson_trace
    num_probes: int = 1
    fresh_probes: bool = False

    def __post_init__(self) -> None:
        if self.num_probes < 1:
            raise UserError(f"num_probes={self.num_probes}: give at least 1")
        if not isinstance(self.ode, ODESampler):
            raise UserError(
                f"{type(self.ode).__name__} follows no flow: likelihoods need "
                "FixedStepODE, Adams or AdaptiveODE"
            )

    def __call__(
        self, net: Net, process: Process, data: Batch, probes: StepNoise
    ) -> FlowLikelihoodResult:
        """Returns the log density of each image of data [b, h, w, c].

        Args:
          net: with labels bound, without guidance: a guided field is not a model's
            density.
          process: a continuous one.
          data: what the network models, pixels or latents.
          probes: number -> directions of +-1 [b, h, w, c].
        """
        continuous = require_continuous(self, process)
        velocity = continuous.prediction_fn(net, predictions.velocity)
        fixed = jax.vmap(probes)(jnp.arange(self.num_probes))  # (k, b, h, w, c)

        def probes_at(t: Array) -> Array:
            if not self.fresh_probes:
                return fixed
            number = jax.lax.bitcast_convert_type(jnp.float32(t), jnp.int32)
            return jax.vmap(probes)(number ^ jnp.arange(self.num_probes))

        def slope(t: Array, state: tuple[Batch, PerImage]) -> tuple[Batch, PerImage]:
            times = jnp.broadcast_to(jnp.float32(t), data.shape[:1])  # (b,)
            out, vjp = jax.vjp(lambda x: velocity(x, times), state[0])
            return out, self.trace(probes_at(t), vjp)

        start = data.astype(jnp.float32), jnp.zeros(len(data))
        result = self.ode.solve(slope, start, *continuous.time_interval(reverse=True))
        noise, change = result.data
        return FlowLikelihoodResult(
            nats=standard_normal_log_density(noise) + change,
            noise=noise,
            num_evaluations=result.num_evaluations,
            finished=result.finished,
        )


@dataclasses.dataclass(frozen=True)
class VariationalBound:
    """The variational bound on every step of a chain (Ho et al., equation 5).

    The last step's term supposes 8-bit data in [-1, 1], as in training.

    Attributes:
      steps: a spacing, see schedules.space_timesteps.
      clip: clips guesses at the data to [-1, 1].
    """

    steps: int | tuple | Callable = 1000
    clip: bool = False

    def __call__(
        self, net: Net, process: Process, data: Batch, step_noise: StepNoise
    ) -> VariationalBoundResult:
        """Returns the bound for each image of data [b, h, w, c]."""
        chain: Any = require_discrete(self, process).respace(self.steps)
        count, size = chain.num_timesteps, np.prod(data.shape[1:])
        denoised_fn = clip_denoised if self.clip else None

        def step(_: None, i: Array) -> tuple[None, tuple[PerImage, PerImage, PerImage]]:
            t = jnp.full(data.shape[:1], count - 1 - i)
            t_full, noise = expand_dims_like(t, data), step_noise(i)
            x = interpolate(chain.path, data, noise, t_full)
            batch = NoisyBatch(data, noise, x, t_full)
            vb, guess = chain.vb_terms_of(net, batch, denoised_fn)
            alpha, sigma = chain.path(t_full)
            noise_error = (x - alpha * guess) / sigma - noise
            mses = _mean_square(guess - data), _mean_square(noise_error)
            return None, (vb, *mses)

        _, (vb, data_mse, noise_mse) = jax.lax.scan(step, None, jnp.arange(count))
        prior_vb = chain.prior_vb(data)
        return VariationalBoundResult(
            nats=-(jnp.sum(vb, axis=0) + prior_vb) * size * np.log(2.0),
            prior_vb=prior_vb,
            vb=vb,
            data_mse=data_mse,
            noise_mse=noise_mse,
            num_evaluations=jnp.int32(count),
        )


def standard_normal_log_density(x: Float[Array, "b ..."]) -> PerImage:
    """Returns the log density of each row, in nats."""
    return -_sum_per_image(x**2) / 2 - np.prod(x.shape[1:]) / 2 * np.log(2 * np.pi)


def _sum_per_image(x: Float[Array, "b ..."]) -> PerImage:
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def _mean_square(x: Float[Array, "b ..."]) -> PerImage:
    return jnp.mean(x**2, axis=tuple(range(1, x.ndim)))
