"""ODE samplers: exact solutions, counts, and several devices."""

import dataclasses

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.samplers import (
    EVERY,
    PATHS,
    PREDICTS,
    SAMPLERS,
    counted,
    gaussian,
    once,
    one_image,
    solved,
)

from sit_jax.diffusion import predictions
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.paths import expand_dims_like
from sit_jax.errors import UserError
from sit_jax.parallel.mesh import batch_sharding, make_mesh
from sit_jax.samplers.adaptive_ode import AdaptiveODE
from sit_jax.samplers.fixed_ode import (
    Adams,
    FixedStepODE,
    euler,
    heun,
    heun3,
    midpoint,
    rk4,
)
from sit_jax.samplers.torchdiffeq import torchdiffeq_control


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "method, order, steps",
    [
        (euler, 1, (8, 32)),
        (midpoint, 2, (8, 32)),
        (heun, 2, (8, 32)),
        (heun3, 3, (4, 16)),
        (rk4, 4, (2, 6)),
    ],
    ids=["euler", "midpoint", "heun", "heun3", "rk4"],
)
def test_order_of_fixed_methods(method, order, steps, reverse):
    coarse, fine = (solved(FixedStepODE(method, n, reverse))[0] for n in steps)
    # 0.3: the terms of higher order
    assert abs(np.log(coarse / fine) / np.log(steps[1] / steps[0]) - order) < 0.3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("predicts", [*PREDICTS, "data"])
def test_gaussian_data_exactly(path, predicts):
    """For Gaussian data the flow maps each value linearly, by the ratio of spreads."""
    predicts = PREDICTS.get(predicts, predictions.data)
    process, mean, std = Interpolant(PATHS[path], predicts), 1.5, 0.5
    start = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    net = gaussian(process, mean, std)
    data = once(lambda z: FixedStepODE(heun, 200)(net, process, z))(start).data
    (at_0, left_0), (at_1, left_1) = (
        map(float, process.path(jnp.float32(t))) for t in process.time_interval()
    )
    ratio = np.hypot(at_1 * std, left_1) / np.hypot(at_0 * std, left_0)
    # 200 steps of order 2, with slopes up to about 10
    np.testing.assert_allclose(
        data, at_1 * mean + ratio * (start - at_0 * mean), atol=2e-3
    )


@pytest.mark.parametrize("path, predicts", EVERY)
@pytest.mark.parametrize("method", [euler, heun])
def test_one_image_is_found(path, predicts, method):
    process = Interpolant(PATHS[path], PREDICTS[predicts])
    image = jnp.linspace(-1, 1, 16).reshape(1, 4, 4, 1)
    noise = jax.random.normal(jax.random.key(1), (3, 4, 4, 1))
    net = one_image(process, image)
    data = once(lambda z: FixedStepODE(method, 200)(net, process, z))(noise).data
    # what is left of the noise at the end, up to 0.011 of it, and the grid's error
    np.testing.assert_allclose(data, jnp.broadcast_to(image, data.shape), atol=0.05)


@pytest.mark.parametrize(
    "sampler",
    [
        FixedStepODE(euler, 7),
        FixedStepODE(heun, 7),
        AdaptiveODE(rtol=1e-5, atol=1e-5),
        AdaptiveODE(reverse=True),
        AdaptiveODE(diffrax.Heun()),  # keeps no slope for the next step
        AdaptiveODE(control=torchdiffeq_control),
        Adams(6),
        Adams(6, implicit=True),
    ],
    ids=[
        *("euler", "heun", "dopri5", "dopri5 in reverse", "adaptive heun"),
        *("torchdiffeq", "adams", "implicit adams"),
    ],
)
def test_evaluations_are_those_made(sampler):
    # the jump makes adaptive solvers reject steps
    bumpy = lambda x, t: jnp.where(expand_dims_like(t, x) < 0.4, -x, 9 * jnp.cos(9 * x))
    net, calls = counted(bumpy)
    run = once(lambda z: sampler(net, Interpolant(), z))
    stats = run(jnp.linspace(-1, 1, 16).reshape(2, 2, 2, 2)).stats()
    jax.effects_barrier()
    assert len(calls) == stats["evaluations"] and stats["evaluations"].dtype == np.int32
    if isinstance(sampler, AdaptiveODE):
        assert stats["rejected"] > 0 and stats["finished"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_four_devices_equal_one(name):
    sampler = SAMPLERS[name]
    net = lambda x, t: (
        jnp.tanh(3 * x) * (1 + expand_dims_like(t, x)) + jnp.roll(x, 1, axis=1)
    )
    noise = jax.random.normal(jax.random.key(0), (8, 4, 4, 2))
    run = lambda z: sampler(net, Interpolant(), z)
    result = once(run)(noise)
    alone, stats = result.data, result.stats()
    where = batch_sharding(make_mesh(devices=jax.devices()[:4]))
    result = once(run, in_shardings=where)(noise)
    shared, shared_stats = result.data, result.stats()
    assert len(shared.sharding.device_set) == 4
    np.testing.assert_allclose(shared, alone, rtol=1e-6, atol=1e-6)
    for key in stats:
        assert np.array_equal(stats[key], shared_stats[key]), key


@pytest.mark.parametrize("name", SAMPLERS)
def test_draw_is_not_called_and_the_state_is_float32(name):
    sampler = SAMPLERS[name]

    def draw(i):
        raise AssertionError("a deterministic sampler wants no noise")

    net = lambda x, t: jax.lax.reduce_precision(x, 8, 7).astype(jnp.bfloat16)
    start = jnp.ones((1, 2, 2, 1), jnp.bfloat16)
    data = once(lambda z: sampler(net, Interpolant(), z, draw))(start).data
    assert data.dtype == jnp.float32


@pytest.mark.parametrize("name", SAMPLERS)
def test_states_kept_on_the_way(name):
    """Evenly spaced, and the last is the end; x = exp(t) tells when."""
    sampler = dataclasses.replace(SAMPLERS[name], trajectory_length=2)
    sampler = dataclasses.replace(sampler, steps=4) if name == "fixed" else sampler
    net = lambda x, t: x
    start = jnp.ones((2, 2, 2, 1))
    result = once(lambda z: sampler(net, Interpolant(), z))(start)
    data, stats = result.data, result.stats()
    way = stats["trajectory"]
    assert way.shape == (2, 2, 2, 2, 1)
    np.testing.assert_allclose(way[-1], data, rtol=1e-6)
    np.testing.assert_allclose(way[0], np.exp(0.5), rtol=1e-2)


def test_more_states_than_steps_are_refused():
    with pytest.raises(UserError, match="trajectory_length=5.*3 steps"):
        FixedStepODE(heun, 3, trajectory_length=5)(
            lambda x, t: x, Interpolant(), jnp.ones((1, 1, 1, 1))
        )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FixedStepODE(steps=0), "steps=0"),
        (lambda: FixedStepODE(steps=-3), "steps=-3"),
        (lambda: FixedStepODE(steps=2.5), "steps=2.5"),
        (lambda: FixedStepODE(trajectory_length=-1), "trajectory_length=-1"),
        (lambda: Adams(0), "steps=0: a whole number of at least 1"),
        (lambda: Adams(corrections=0), "corrections=0"),
        (lambda: Adams(rtol=-1.0), "rtol=-1"),
        (lambda: AdaptiveODE(trajectory_length=1.5), "trajectory_length=1.5"),
        (lambda: AdaptiveODE(rtol=-1e-3), "rtol=-0.001"),
        (lambda: AdaptiveODE(atol=float("nan")), "atol=nan"),
        (lambda: AdaptiveODE(rtol=0, atol=0), "rtol=0"),
        (lambda: AdaptiveODE(max_steps=0), "max_steps=0"),
        (lambda: AdaptiveODE(diffrax.Euler()), "Euler.*Dopri5"),
        (lambda: AdaptiveODE(diffrax.Kvaerno3()), "Kvaerno3.*Dopri5"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    "sampler",
    [FixedStepODE(), AdaptiveODE(), Adams()],
    ids=["fixed", "adaptive", "adams"],
)
def test_a_diffusion_is_refused(sampler):
    with pytest.raises(UserError, match="Diffusion .* use DDPM or DDIM"):
        sampler(None, GaussianDiffusion(), None)


# torchdiffeq 0.2.5 on dx/dt = x + t from x(0) = 1, ten steps to 1: x(1), evaluations
ADAMS = {
    "explicit": (Adams(10), 3.4364307, 16),
    "implicit": (Adams(10, implicit=True), 3.4365571, 24),
}


@pytest.mark.parametrize("name", ADAMS)
def test_adams_is_torchdiffeqs(name):
    sampler, value, evaluations = ADAMS[name]
    error, stats = solved(sampler)
    exact = 2 * np.e - 2
    # rounding over ten steps
    np.testing.assert_allclose(error, abs(value - exact) / exact, atol=1e-6)
    assert stats["evaluations"] == evaluations


@pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])
def test_adams_rises_in_order(implicit):
    """Eleven known slopes are exact for polynomials that four are not exact for."""
    net = lambda x, t: jnp.broadcast_to(8 * expand_dims_like(t, x) ** 7, x.shape)
    start = jnp.zeros((1, 1, 1, 1))
    run = once(lambda z: Adams(24, implicit)(net, Interpolant(), z).data)
    assert abs(float(run(start)[0, 0, 0, 0]) - 1) < 1e-5
    one = once(lambda z: FixedStepODE(euler, 24)(net, Interpolant(), z).data)
    assert abs(float(one(start)[0, 0, 0, 0]) - 1) > 0.1
