"""A recorded network, noise and closed-form ones for the chains of a diffusion."""

from functools import partial

import jax
import numpy as np
import pytest
from helpers.recorded import arrays, case, weights

from sit_jax.convert.rules import DIT_RULES, to_flax
from sit_jax.diffusion.gaussian import GaussianDiffusion, fixed_small
from sit_jax.diffusion.rng import recorded_noise
from sit_jax.models import dit, layers

EVERY = case("dit_sampling")["runs"]
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
