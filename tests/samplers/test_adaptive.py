"""Adaptive ODE steps: their first, their last, and an image's own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.samplers import PATHS, SAMPLERS, gaussian, once, one_image, solved

from sit_jax.diffusion import predictions
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.paths import expand_dims_like
from sit_jax.samplers.adaptive_ode import AdaptiveODE, per_sample_control
from sit_jax.samplers.fixed_ode import FixedStepODE, heun


@pytest.mark.parametrize("reverse", [False, True])
def test_dopri5_keeps_its_tolerance(reverse):
    loose, tight = (
        solved(AdaptiveODE(rtol=tol, atol=tol, reverse=reverse)) for tol in (1e-2, 1e-5)
    )
    assert loose[0] < 1e-2 and tight[0] < 3e-5 and 5 * tight[0] < loose[0]
    assert tight[1]["accepted"] > loose[1]["accepted"]


@pytest.mark.slow
def test_gaussian_data_adaptively():
    process = Interpolant(PATHS["VP"], predictions.score)
    start = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    net = gaussian(process, 1.5, 0.5)
    run = lambda s: once(lambda z: s(net, process, z))(start)
    result = run(AdaptiveODE(rtol=1e-5, atol=1e-5))
    data, stats = result.data, result.stats()
    result = run(FixedStepODE(heun, 400))
    fixed, _ = result.data, result.stats()
    assert stats["finished"]
    np.testing.assert_allclose(data, fixed, atol=1e-3)  # the fixed grid's own error


@pytest.mark.slow
def test_one_image_is_found_adaptively():
    process = Interpolant(PATHS["Linear"], predictions.score)
    image = jnp.linspace(-1, 1, 16).reshape(1, 4, 4, 1)
    noise = jax.random.normal(jax.random.key(1), (3, 4, 4, 1))
    net = one_image(process, image)
    result = once(lambda z: AdaptiveODE()(net, process, z))(noise)
    data, stats = result.data, result.stats()
    assert stats["finished"]
    np.testing.assert_allclose(data, jnp.broadcast_to(image, data.shape), atol=0.02)


def test_first_step_follows_the_slope():
    """diffrax by itself would start with 0.01, whatever the slope."""
    at = []
    net = lambda x, t: jax.debug.callback(at.append, t[0]) or jnp.zeros_like(x) + 1e-3
    sampler = AdaptiveODE(rtol=1e-3, atol=1e-3)
    stats = once(lambda z: sampler(net, Interpolant(), z))(
        jnp.ones((1, 2, 2, 1))
    ).stats()
    jax.effects_barrier()
    # the first is (0.01 / 0.5)^(1/5) = 0.46 long; from 0.01 there would be three
    assert stats["accepted"] == 2 and min(at) == 0 and max(at) == 1


ADAPTIVE_ONES = [name for name in SAMPLERS if name not in ("fixed", "adams")]


@pytest.mark.parametrize("name", ADAPTIVE_ONES)
def test_too_few_steps_allowed_is_reported(name):
    net = lambda x, t: jnp.cos(30 * expand_dims_like(t, x)) * x
    sampler = dataclasses.replace(SAMPLERS[name], max_steps=3)
    start = jnp.ones((1, 2, 2, 1))
    result = once(lambda z: sampler(net, Interpolant(), z))(start)
    data, stats = result.data, result.stats()
    assert not stats["finished"].any() and np.isfinite(data).all()
    assert stats["accepted"] + stats["rejected"] == 3


@pytest.mark.parametrize(
    "name, begins",
    [("global", 0.0), ("global", 0.5), ("sample", 0.5), ("torchdiffeq", 0.5)],
)
def test_a_network_that_is_not_finite_ends_soon(name, begins):
    net = lambda x, t: jnp.where(expand_dims_like(t, x) < begins, x, jnp.nan)
    start = jnp.ones((1, 2, 2, 1))
    run = once(lambda z: SAMPLERS[name](net, Interpolant(), z))
    stats = run(start).stats()
    assert not stats["finished"].any() and stats["evaluations"] < 1000


def jumping(x, t):
    """Images of different wildness, which need different steps."""
    return jnp.sin(3 * x * (1 + expand_dims_like(t, x))) * jnp.abs(x).max(
        axis=(1, 2, 3), keepdims=True
    )


def test_an_image_of_its_own_steps_does_not_see_its_neighbours():
    sampler = AdaptiveODE(rtol=1e-4, atol=1e-4, control=per_sample_control)
    noise = jax.random.normal(jax.random.key(0), (5, 4, 4, 2))
    noise *= jnp.arange(1, 6)[:, None, None, None] / 2
    run = jax.jit(lambda z: sampler(jumping, Interpolant(), z))
    result = run(noise)
    together, stats = result.data, result.stats()
    assert len(set(stats["evaluations"].tolist())) > 2 and stats["finished"].all()
    keep = np.array([4, 0])
    result = run(noise[keep])
    alone, few = result.data, result.stats()
    np.testing.assert_array_equal(alone, together[keep])
    assert few["evaluations"].tolist() == stats["evaluations"][keep].tolist()
