"""How probable data are to a model.

For an Interpolant exactly, by the flow's change of variables (Song et al. 2021,
arXiv:2011.13456, app. D.2): log p(data) = log p(noise) + the integral of the
divergence along the way, noise standard normal. For a Diffusion by the variational
bound, every step of the chain.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.diffusion import predictions
from sit_jax.diffusion.gaussian import NoisedBatch, clip_denoised
from sit_jax.diffusion.paths import expand_dims_like, interpolate
from sit_jax.errors import UserError
from sit_jax.samplers.adaptive_ode import AdaptiveODE
from sit_jax.samplers.base import require_continuous
from sit_jax.samplers.ddpm import respaced_process

MOST_EXACT = 4096  # dimensions up to which the whole trace is reasonable


def hutchinson_trace(probes, vjp):
    """The trace from probes [K, B, ...] of +-1 (Hutchinson 1990): -> [B]."""
    one = lambda probe: _rows(probe * vjp(probe)[0])
    return jnp.mean(jax.lax.map(one, probes), axis=0)


def exact_trace(probes, vjp):
    """The whole trace, one pass for each dimension; probes give only the shape."""
    _, rows, *shape = probes.shape
    size = int(np.prod(shape))
    if size > MOST_EXACT:
        raise UserError(
            f"the exact trace of {size} dimensions takes as many passes an evaluation; "
            f"at most {MOST_EXACT}: take estimated traces"
        )

    def one(total, i):
        unit = (jnp.arange(size) == i).astype(jnp.float32).reshape(shape)
        unit = jnp.broadcast_to(unit, (rows, *shape))
        return total + _rows(unit * vjp(unit)[0]), None

    return jax.lax.scan(one, jnp.zeros(rows), jnp.arange(size))[0]


@dataclasses.dataclass(frozen=True)
class FlowLikelihood:
    """Log density under the flow, in nats.

    ode: a FixedStepODE, Adams or AdaptiveODE, whose direction is ignored. trace: e.g.
    exact. probes: directions averaged over, the same all along the way; fresh: new ones
    at every time, as released, which an adaptive solver can hardly follow.
    """

    ode: object = AdaptiveODE(rtol=1e-5, atol=1e-5)
    trace: Callable = hutchinson_trace
    probes: int = 1
    fresh: bool = False

    def __post_init__(self):
        if self.probes < 1:
            raise UserError(f"probes={self.probes}: give at least 1")
        if not hasattr(self.ode, "solve"):
            raise UserError(
                f"{type(self.ode).__name__} follows no flow: likelihoods need "
                "FixedStepODE, Adams or AdaptiveODE"
            )

    def __call__(self, draw, process, net, data):
        """data, draw(i) of +-1 [B, H, W, C] -> (stats with "nats" [B], noise).

        net sees labels alone, no guidance: a guided field is not a model's density.
        """
        require_continuous(self, process)
        velocity = process.field(net, predictions.velocity)
        fixed = jax.vmap(draw)(jnp.arange(self.probes))

        def slope(t, state):
            at = jnp.broadcast_to(jnp.float32(t), data.shape[:1])
            out, vjp = jax.vjp(lambda x: velocity(x, at), state[0])
            return out, self.trace(self._directions(draw, t, fixed), vjp)

        start = data.astype(jnp.float32), jnp.zeros(len(data))
        span = process.span(reverse=True)
        (noise, change), stats = self.ode.solve(slope, start, *span)
        stats.pop("trajectory", None)
        return {"nats": standard_normal_log_density(noise) + change, **stats}, noise

    def _directions(self, draw, t, fixed):
        if not self.fresh:
            return fixed
        number = jax.lax.bitcast_convert_type(jnp.float32(t), jnp.int32)
        return jax.vmap(draw)(number ^ jnp.arange(self.probes))


@dataclasses.dataclass(frozen=True)
class VariationalBound:
    """The variational bound on every step of a chain, in nats (Ho et al. 2020, eq. 5).

    steps: a spacing, see schedules.kept_steps. clip: guesses at the data to [-1, 1].
    The last step's term supposes 8-bit data in [-1, 1], as in training.
    """

    steps: int | tuple | Callable = 1000
    clip: bool = False

    def __call__(self, draw, process, net, data):
        """-> (stats: "nats" [B], "prior" [B] in nats, and by step from the noisiest
        "bound" [T, B] in bits/dim, "data_mse" and "noise_mse" [T, B]), None.
        """
        process = respaced_process(self, process)
        n, size = len(process.betas), np.prod(data.shape[1:])
        mend = clip_denoised if self.clip else None

        def step(_, i):
            t = jnp.full(data.shape[:1], n - 1 - i)
            at, noise = expand_dims_like(t, data), draw(i)
            batch = NoisedBatch(
                data, noise, interpolate(process.path, data, noise, at), at
            )
            bits, guess = process.bound_at(net, batch, t, mend)
            alpha, sigma = process.path(at)
            missed = (batch.x - alpha * guess) / sigma - noise
            return None, (bits, _mean(guess - data), _mean(missed))

        _, (bound, data_mse, noise_mse) = jax.lax.scan(step, None, jnp.arange(n))
        prior = process.prior_bits(data)
        stats = {
            "nats": -(jnp.sum(bound, axis=0) + prior) * size * np.log(2.0),
            "prior": prior,
            "bound": bound,
            "data_mse": data_mse,
            "noise_mse": noise_mse,
            "evaluations": jnp.int32(n),
        }
        return stats, None


def standard_normal_log_density(x):
    """x [B, ...] -> log density [B], nats."""
    return -_rows(x**2) / 2 - np.prod(x.shape[1:]) / 2 * np.log(2 * np.pi)


def _rows(x):
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def _mean(x):
    return jnp.mean(x**2, axis=tuple(range(1, x.ndim)))
