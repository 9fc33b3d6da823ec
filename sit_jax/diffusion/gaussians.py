"""What the Gaussians of a diffusion's chain have in closed form."""

import jax
import jax.numpy as jnp
import numpy as np


def gather(table, t, dtype=jnp.float32):
    """A float64 table, or one number, at steps t; rounded after all else is done."""
    table = np.asarray(table, dtype)
    return jnp.asarray(table)[t] if table.ndim else table


def true_step(beta, before, after):
    """q(x_{t-1} | x_t, data): weight of data, weight of x_t, variance.

    before and after are alpha_bar at t-1 and t. Ho et al. 2020, eq. 7.
    """
    on_data = beta * np.sqrt(before) / (1 - after)
    on_x = (1 - before) * np.sqrt(1 - beta) / (1 - after)
    return on_data, on_x, beta * (1 - before) / (1 - after)


def log_bin_mass(x, mean, log_var, half=1 / 255):
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
