"""The recorded diffusions, networks for their chains, and jitted questions."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.recorded import arrays, case, nhwc, weights

from sit_jax.convert.rules import DIT_RULES, to_flax
from sit_jax.diffusion import gaussian as d
from sit_jax.diffusion import predictions
from sit_jax.diffusion.gaussian import GaussianDiffusion, clip_denoised, fixed_small
from sit_jax.diffusion.rng import recorded_noise
from sit_jax.diffusion.schedules import DDIMSpacing, cosine_betas
from sit_jax.models import dit, layers

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


CHAIN_RUNS = case("dit_sampling")["runs"]
SMALL = GaussianDiffusion(variance=fixed_small)


@pytest.fixture
def model(monkeypatch):
    """net(x, t, y) with the recorded weights and frequency table."""
    table = arrays("dit_forward_a")["freqs_f32"]
    monkeypatch.setattr(layers, "timestep_frequencies", lambda half, shift: table)
    params, _ = to_flax(DIT_RULES, weights("dit_a"))
    made = dit.DiT(depth=2, width=40, heads=4, classes=10)
    return partial(made.apply, {"params": params})


def watched(net, states):
    """net, leaving each x it is shown in `states`: the chain step by step."""

    def watching(x, t):
        jax.debug.callback(lambda x: states.append(np.asarray(x)), x, ordered=True)
        return net(x, t)

    return watching


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@partial(jax.jit, static_argnums=(0, 1, 2))
def sample(sampler, process, net, noise, kicks):
    return sampler(net, process, noise, recorded_noise(kicks)).data


def truthful(data, process=SMALL):
    """A network that knows the data, asked for the noise; t are original steps."""

    def net(x, t):
        alpha, sigma = process.path(t[:, None, None, None])
        return (x - alpha * data) / sigma

    return net


def gaussian(mean, std, process):
    """The best guess at the noise when the data are N(mean, std^2)."""

    def net(x, t):
        alpha, sigma = process.path(t[:, None, None, None])
        return sigma * (x - alpha * mean) / ((alpha * std) ** 2 + sigma**2)

    return net
