"""The recorded diffusions, and jitted questions to one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from helpers.recorded import arrays, nhwc

from sit_jax.diffusion import gaussian as d
from sit_jax.diffusion import predictions
from sit_jax.diffusion.gaussian import GaussianDiffusion, clip_denoised
from sit_jax.diffusion.schedules import DDIMSpacing, cosine_betas

# What create_diffusion's options are called here. The released KL loss is always
# rescaled; the plain one differs from it by the number of steps.
FULL = GaussianDiffusion()
VARIANTS = {
    "v0": FULL,
    "v1": GaussianDiffusion(objective=d.rescaled_hybrid_loss),
    "v2": GaussianDiffusion(objective=d.rescaled_kl_loss),
    "v3": GaussianDiffusion(prediction=predictions.data),
    "v4": GaussianDiffusion(variance=d.fixed_large),
    "v5": GaussianDiffusion(variance=d.fixed_small),
    "v6": GaussianDiffusion(schedule=cosine_betas),
}
SPACINGS = {"full": 1000, "10": 10, "50": 50, "ddim25": DDIMSpacing(25)}
EVERY = jnp.arange(1000)


@partial(jax.jit, static_argnums=0)
def loss_of(process, out, data, noise, t):
    return process.losses(given(out), data, noise, t)


@partial(jax.jit, static_argnums=(0, 4))
def posterior_of(process, out, x, t, clip=False):
    return process.posterior(given(out), x, t, clip_denoised if clip else None)


def given(out):
    """A network that says `out` whatever it sees."""
    return lambda x, t: jnp.asarray(out)


def batch():
    """The recorded data, noise [4, 8, 8, 4] and t = 0, 3, 251, 999."""
    g = arrays("dit_training_losses")
    return nhwc(g["x_start"]), nhwc(g["noise"]), jnp.asarray(g["t"], jnp.int32)


def some(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def close(ours, theirs, floor=0.0):
    """Within five times the float32 noise of the recording, or 1e-5 of its scale."""
    slack = max(5 * floor, 1e-5 * np.abs(theirs).max())
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=slack)


def close_loss(ours, theirs, floor):
    """At t = 0, entry 0, torch lost digits that we keep: we differ by what it lost.

    2e-7: the KL of the other entries is a difference of numbers near one.
    """
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2e-5, atol=1.02 * floor)
    np.testing.assert_allclose(ours[1:], theirs[1:], rtol=2e-5, atol=2e-7)
