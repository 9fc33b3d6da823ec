"""Paths from noise to data: x_t = alpha(t) * data + sigma(t) * noise.

A path is a function t -> (alpha, sigma), with pure noise (or nearly) at time 0 and data
at time 1. Its derivatives come from automatic differentiation.

Source: Ma et al., arXiv:2401.08740 (SiT), section 2.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from sit_jax.errors import UserError
from sit_jax.typing import Path

Times = Float[Array, "..."]


def linear(t: Times) -> tuple[Times, Times]:
    """Returns alpha = t and sigma = 1 - t, the path of rectified flow."""
    return t, 1 - t


def gvp(t: Times) -> tuple[Times, Times]:
    """Returns the trigonometric path, which keeps alpha^2 + sigma^2 = 1."""
    return jnp.sin(t * math.pi / 2), jnp.cos(t * math.pi / 2)


@dataclasses.dataclass(frozen=True)
class VP:
    """The variance-preserving path of the linear-beta diffusion in continuous time.

    alpha(0) is 0.0066 and not quite 0.

    Source: Song et al., arXiv:2011.13456, appendix C.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        low, high = self.beta_min, self.beta_max
        if not (low >= 0 and high >= 0 and 0 < low + high < math.inf):
            raise UserError(
                f"beta_min={low}, beta_max={high} of VP: both must be finite and not "
                "negative, and one of them positive"
            )

    def __call__(self, t: Times) -> tuple[Times, Times]:
        s = 1 - t
        log_alpha = -s * (s * (self.beta_max - self.beta_min) / 4 + self.beta_min / 2)
        # expm1, since 1 - exp(..) has few right digits left where sigma is small
        return jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))


def path_derivatives(path: Path, t: Times) -> tuple[Times, Times]:
    """Returns the time derivatives of alpha and sigma."""
    t = jnp.asarray(t)
    return jax.jvp(path, (t,), (jnp.ones_like(t),))[1]


def sde_diffusion_rate(path: Path, t: Times) -> Times:
    """Returns b of dx = a(t) x dt + sqrt(2b) dB, the SDE that adds the path's noise.

    b = sigma^2 alpha'/alpha - sigma sigma'. Infinite at time 0 where alpha(0) = 0.

    Source: Song et al., arXiv:2011.13456, in the notation of SiT (appendix A.3).
    """
    alpha, sigma = path(t)
    d_alpha, d_sigma = path_derivatives(path, t)
    return sigma**2 * d_alpha / alpha - sigma * d_sigma


def interpolate(
    path: Path,
    data: Float[Array, "b ..."],
    noise: Float[Array, "b ..."],
    t: Num[Array, "..."],
) -> Float[Array, "b ..."]:
    """Returns x_t, shaped like data; t must already broadcast against it."""
    alpha, sigma = path(t)
    return alpha * data + sigma * noise


def expand_dims_like(t: Num[Array, "..."], x: Array) -> Num[Array, "..."]:
    """Appends axes of length 1 to t, until it has the rank of x."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))  # (b,) -> (b, 1, ..., 1)
