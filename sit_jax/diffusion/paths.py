"""Paths from noise to data: x_t = alpha(t) * data + sigma(t) * noise.

A path is a function t -> (alpha, sigma), with pure noise (or nearly) at time 0 and data
at time 1. Its slopes come from differentiating it.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sit_jax.errors import UserError


def linear(t):
    return t, 1 - t


def gvp(t):
    """Trigonometric path; keeps alpha^2 + sigma^2 = 1."""
    return jnp.sin(t * math.pi / 2), jnp.cos(t * math.pi / 2)


@dataclasses.dataclass(frozen=True)
class VP:
    """Variance-preserving path of the linear-beta diffusion in continuous time.

    Song et al., arXiv:2011.13456, appendix C; alpha(0) is 0.0066 and not quite 0.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self):
        low, high = self.beta_min, self.beta_max
        if not (low >= 0 and high >= 0 and 0 < low + high < math.inf):
            raise UserError(
                f"beta_min={low}, beta_max={high} of VP: both must be finite and not "
                "negative, and one of them positive"
            )

    def __call__(self, t):
        s = 1 - t
        log_alpha = -s * (s * (self.beta_max - self.beta_min) / 4 + self.beta_min / 2)
        # expm1, since 1 - exp(..) has few right digits left where sigma is small
        return jnp.exp(log_alpha), jnp.sqrt(-jnp.expm1(2 * log_alpha))


def path_derivatives(path, t):
    """-> derivatives of alpha and sigma."""
    t = jnp.asarray(t)
    return jax.jvp(path, (t,), (jnp.ones_like(t),))[1]


def sde_diffusion_rate(path, t):
    """b of dx = a(t) x dt + sqrt(2b) dB, the SDE that noises data along the path.

    b = sigma^2 alpha'/alpha - sigma sigma'. Infinite at time 0 where alpha(0) = 0.
    """
    alpha, sigma = path(t)
    d_alpha, d_sigma = path_derivatives(path, t)
    return sigma**2 * d_alpha / alpha - sigma * d_sigma


def interpolate(path, data, noise, t):
    """-> x_t, shaped like data; t must already broadcast against it."""
    alpha, sigma = path(t)
    return alpha * data + sigma * noise


def expand_dims_like(t, x):
    """t [B] -> [B, 1, ..., 1] with the rank of x."""
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
