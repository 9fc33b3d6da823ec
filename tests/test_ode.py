"""ODE samplers: recorded runs, exact solutions, counts, and several devices."""

import dataclasses

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import arrays, case, nhwc
from toys import (
    EVERY,
    PATHS,
    PREDICTS,
    assert_close,
    counted,
    gaussian,
    once,
    one_image,
    sampled,
)

from sit_jax import predictions
from sit_jax.diffusion import Diffusion
from sit_jax.errors import UserError
from sit_jax.interpolant import Interpolant
from sit_jax.paths import align
from sit_jax.samplers.adams import Adams
from sit_jax.samplers.adaptive import AdaptiveOde, Fehlberg2, per_image
from sit_jax.samplers.ode import Ode, euler, heun, heun3, midpoint, rk4
from sit_jax.samplers.torchdiffeq import like_torchdiffeq
from sit_jax.sharding import make_mesh, split_batch

G = arrays("sit_ode")
RUNS = {run["id"]: run for run in case("sit_ode")["runs"]}
METHODS = {
    "euler": euler,
    "midpoint": midpoint,
    "heun2": heun,
    "heun3": heun3,
    "rk4": rk4,
}
SOLVERS = {
    "dopri5": diffrax.Dopri5(),
    "dopri8": diffrax.Dopri8(),
    "bosh3": diffrax.Bosh3(),
    "adaptive_heun": diffrax.Heun(),
    "fehlberg2": Fehlberg2(),
}
SAMPLERS = {
    "fixed": Ode(heun, 3),
    "adams": Adams(4),
    "global": AdaptiveOde(rtol=1e-4, atol=1e-4),
    "sample": AdaptiveOde(rtol=1e-4, atol=1e-4, control=per_image),
    "torchdiffeq": AdaptiveOde(rtol=1e-4, atol=1e-4, control=like_torchdiffeq),
}


def replayed(run, sampler):
    process = Interpolant(PATHS[run["path"]], PREDICTS[run["prediction"]])
    start = nhwc(G["x_data" if run["reverse"] else "z"])
    return sampled(sampler, process, G["y"], start, cfg=run["cfg"])


# The rest of the recorded runs is in tests/slow. Here are every path, prediction and
# method, guidance, the way back, and a rejected step.
FIXED = "r02 r04 r05 r15 r20 r24 r28 r37 r40".split()
ADAPTIVE = "r07 r10 r11 r12 r13 r22".split()


def compare_fixed(name):
    run = RUNS[name]
    # their number of steps counts the points of the grid
    sampler = Ode(METHODS[run["method"]], run["num_steps"] - 1, run["reverse"])
    data, stats = replayed(run, sampler)
    assert_close(data, G[f"{name}.final"][:2], run["f32_vs_f64"])
    assert stats == {"evaluations": run["nfe"]}


def compare_adaptive(name):
    """By the same steps, to the same numbers."""
    run = RUNS[name]
    sampler = AdaptiveOde(
        SOLVERS[run["method"]],
        rtol=run["rtol"],
        atol=run["atol"],
        control=like_torchdiffeq,
        reverse=run["reverse"],
    )
    data, stats = replayed(run, sampler)
    noise, scale = run["f32_vs_f64"]
    # where atol is near the rounding of float32, that decides about step sizes; the
    # recording then differs from its own float64 run, by `noise`
    error = np.abs(data - G[f"{name}.final"][:2]).max()
    assert error <= max(1e-4, 1e-5 * scale, 5 * noise), (error, noise)
    assert stats.pop("evaluations") == run["nfe"]
    counts = {"accepted": run["n_accepted"], "rejected": run["n_rejected"]}
    assert stats == {**counts, "finished": True}


@pytest.mark.parametrize("name", FIXED)
def test_recorded_fixed_grids(name):
    compare_fixed(name)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_recorded_adaptive_steps(name):
    compare_adaptive(name)


@pytest.mark.parametrize("name", ["r07"])
def test_recorded_dopri5_is_not_further_from_the_solution(name):
    """Not equal: torchdiffeq runs past the end and interpolates back, we end there."""
    run = RUNS[name]
    sampler = AdaptiveOde(rtol=run["rtol"], atol=run["atol"], max_steps=100)
    data, stats = replayed(run, sampler)
    error = np.abs(data - G[run["exact"]][:2]).max()
    assert error < 1.5 * run["solver_error_vs_exact"][0]
    assert (stats["accepted"], stats["rejected"]) == (run["n_accepted"], 0)
    assert stats["evaluations"] == run["nfe"] and stats["finished"]


def test_dopri5_where_the_original_breaks_off():
    """A stage beyond time 1, where VP has no sigma, stops torchdiffeq."""
    assert "underflow" in RUNS["r42"]["error"]
    data, stats = replayed(RUNS["r42"], AdaptiveOde())
    assert stats["finished"] and np.isfinite(data).all()


def solved(sampler, x=1.0):
    """dx/dt = x + t from 0 to 1, forwards or backwards: -> relative error, stats."""
    start = jnp.full((2, 2, 2, 1), x)
    net = lambda x, t: x + align(t, x)
    run = once(lambda start: sampler(None, Interpolant(), net, start))
    data, stats = run(start)
    exact = (x + 2) / np.e - 1 if sampler.reverse else (x + 1) * np.e - 2
    return float(np.abs(data - exact).max() / abs(exact)), stats


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
    coarse, fine = (solved(Ode(method, n, reverse))[0] for n in steps)
    # 0.3: the terms of higher order
    assert abs(np.log(coarse / fine) / np.log(steps[1] / steps[0]) - order) < 0.3


@pytest.mark.parametrize("reverse", [False, True])
def test_dopri5_keeps_its_tolerance(reverse):
    loose, tight = (
        solved(AdaptiveOde(rtol=tol, atol=tol, reverse=reverse)) for tol in (1e-2, 1e-5)
    )
    assert loose[0] < 1e-2 and tight[0] < 3e-5 and 5 * tight[0] < loose[0]
    assert tight[1]["accepted"] > loose[1]["accepted"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("predicts", [*PREDICTS, "data"])
def test_gaussian_data_exactly(path, predicts):
    """For Gaussian data the flow maps each value linearly, by the ratio of spreads."""
    predicts = PREDICTS.get(predicts, predictions.data)
    process, mean, std = Interpolant(PATHS[path], predicts), 1.5, 0.5
    start = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    net = gaussian(process, mean, std)
    data, _ = once(lambda z: Ode(heun, 200)(None, process, net, z))(start)
    (at_0, left_0), (at_1, left_1) = (
        map(float, process.path(jnp.float32(t))) for t in process.span()
    )
    ratio = np.hypot(at_1 * std, left_1) / np.hypot(at_0 * std, left_0)
    # 200 steps of order 2, with slopes up to about 10
    np.testing.assert_allclose(
        data, at_1 * mean + ratio * (start - at_0 * mean), atol=2e-3
    )


@pytest.mark.slow
def test_gaussian_data_adaptively():
    process = Interpolant(PATHS["VP"], predictions.score)
    start = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    net = gaussian(process, 1.5, 0.5)
    run = lambda s: once(lambda z: s(None, process, net, z))(start)
    data, stats = run(AdaptiveOde(rtol=1e-5, atol=1e-5))
    fixed, _ = run(Ode(heun, 400))
    assert stats["finished"]
    np.testing.assert_allclose(data, fixed, atol=1e-3)  # the fixed grid's own error


@pytest.mark.parametrize("path, predicts", EVERY)
@pytest.mark.parametrize("method", [euler, heun])
def test_one_image_is_found(path, predicts, method):
    process = Interpolant(PATHS[path], PREDICTS[predicts])
    image = jnp.linspace(-1, 1, 16).reshape(1, 4, 4, 1)
    noise = jax.random.normal(jax.random.key(1), (3, 4, 4, 1))
    net = one_image(process, image)
    data, _ = once(lambda z: Ode(method, 200)(None, process, net, z))(noise)
    # what is left of the noise at the end, up to 0.011 of it, and the grid's error
    np.testing.assert_allclose(data, jnp.broadcast_to(image, data.shape), atol=0.05)


@pytest.mark.slow
def test_one_image_is_found_adaptively():
    process = Interpolant(PATHS["Linear"], predictions.score)
    image = jnp.linspace(-1, 1, 16).reshape(1, 4, 4, 1)
    noise = jax.random.normal(jax.random.key(1), (3, 4, 4, 1))
    net = one_image(process, image)
    data, stats = once(lambda z: AdaptiveOde()(None, process, net, z))(noise)
    assert stats["finished"]
    np.testing.assert_allclose(data, jnp.broadcast_to(image, data.shape), atol=0.02)


@pytest.mark.parametrize(
    "sampler",
    [
        Ode(euler, 7),
        Ode(heun, 7),
        AdaptiveOde(rtol=1e-5, atol=1e-5),
        AdaptiveOde(reverse=True),
        AdaptiveOde(diffrax.Heun()),  # keeps no slope for the next step
        AdaptiveOde(control=like_torchdiffeq),
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
    bumpy = lambda x, t: jnp.where(align(t, x) < 0.4, -x, 9 * jnp.cos(9 * x))
    net, calls = counted(bumpy)
    run = once(lambda z: sampler(None, Interpolant(), net, z))
    _, stats = run(jnp.linspace(-1, 1, 16).reshape(2, 2, 2, 2))
    jax.effects_barrier()
    assert len(calls) == stats["evaluations"] and stats["evaluations"].dtype == np.int32
    if isinstance(sampler, AdaptiveOde):
        assert stats["rejected"] > 0 and stats["finished"]


def test_first_step_follows_the_slope():
    """diffrax by itself would start with 0.01, whatever the slope."""
    at = []
    net = lambda x, t: jax.debug.callback(at.append, t[0]) or jnp.zeros_like(x) + 1e-3
    sampler = AdaptiveOde(rtol=1e-3, atol=1e-3)
    _, stats = once(lambda z: sampler(None, Interpolant(), net, z))(
        jnp.ones((1, 2, 2, 1))
    )
    jax.effects_barrier()
    # the first is (0.01 / 0.5)^(1/5) = 0.46 long; from 0.01 there would be three
    assert stats["accepted"] == 2 and min(at) == 0 and max(at) == 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_four_devices_equal_one(name):
    sampler = SAMPLERS[name]
    net = lambda x, t: jnp.tanh(3 * x) * (1 + align(t, x)) + jnp.roll(x, 1, axis=1)
    noise = jax.random.normal(jax.random.key(0), (8, 4, 4, 2))
    run = lambda z: sampler(None, Interpolant(), net, z)
    alone, stats = once(run)(noise)
    where = split_batch(make_mesh(devices=jax.devices()[:4]))
    shared, shared_stats = once(run, in_shardings=where)(noise)
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
    data, _ = once(lambda z: sampler(draw, Interpolant(), net, z))(start)
    assert data.dtype == jnp.float32


ADAPTIVE_ONES = [name for name in SAMPLERS if name not in ("fixed", "adams")]


@pytest.mark.parametrize("name", ADAPTIVE_ONES)
def test_too_few_steps_allowed_is_reported(name):
    net = lambda x, t: jnp.cos(30 * align(t, x)) * x
    sampler = dataclasses.replace(SAMPLERS[name], max_steps=3)
    start = jnp.ones((1, 2, 2, 1))
    data, stats = once(lambda z: sampler(None, Interpolant(), net, z))(start)
    assert not stats["finished"].any() and np.isfinite(data).all()
    assert stats["accepted"] + stats["rejected"] == 3


@pytest.mark.parametrize(
    "name, begins",
    [("global", 0.0), ("global", 0.5), ("sample", 0.5), ("torchdiffeq", 0.5)],
)
def test_a_network_that_is_not_finite_ends_soon(name, begins):
    net = lambda x, t: jnp.where(align(t, x) < begins, x, jnp.nan)
    start = jnp.ones((1, 2, 2, 1))
    run = once(lambda z: SAMPLERS[name](None, Interpolant(), net, z))
    data, stats = run(start)
    assert not stats["finished"].any() and stats["evaluations"] < 1000


def jumping(x, t):
    """Images of different wildness, which need different steps."""
    return jnp.sin(3 * x * (1 + align(t, x))) * jnp.abs(x).max(
        axis=(1, 2, 3), keepdims=True
    )


def test_an_image_of_its_own_steps_does_not_see_its_neighbours():
    sampler = AdaptiveOde(rtol=1e-4, atol=1e-4, control=per_image)
    noise = jax.random.normal(jax.random.key(0), (5, 4, 4, 2))
    noise *= jnp.arange(1, 6)[:, None, None, None] / 2
    run = jax.jit(lambda z: sampler(None, Interpolant(), jumping, z))
    together, stats = run(noise)
    assert len(set(stats["evaluations"].tolist())) > 2 and stats["finished"].all()
    keep = np.array([4, 0])
    alone, few = run(noise[keep])
    np.testing.assert_array_equal(alone, together[keep])
    assert few["evaluations"].tolist() == stats["evaluations"][keep].tolist()


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
    net = lambda x, t: jnp.broadcast_to(8 * align(t, x) ** 7, x.shape)
    start = jnp.zeros((1, 1, 1, 1))
    run = once(lambda z: Adams(24, implicit)(None, Interpolant(), net, z)[0])
    assert abs(float(run(start)[0, 0, 0, 0]) - 1) < 1e-5
    one = once(lambda z: Ode(euler, 24)(None, Interpolant(), net, z)[0])
    assert abs(float(one(start)[0, 0, 0, 0]) - 1) > 0.1


@pytest.mark.parametrize("name", SAMPLERS)
def test_states_kept_on_the_way(name):
    """Evenly spaced, and the last is the end; x = exp(t) tells when."""
    sampler = dataclasses.replace(SAMPLERS[name], frames=2)
    sampler = dataclasses.replace(sampler, steps=4) if name == "fixed" else sampler
    net = lambda x, t: x
    start = jnp.ones((2, 2, 2, 1))
    data, stats = once(lambda z: sampler(None, Interpolant(), net, z))(start)
    way = stats["trajectory"]
    assert way.shape == (2, 2, 2, 2, 1)
    np.testing.assert_allclose(way[-1], data, rtol=1e-6)
    np.testing.assert_allclose(way[0], np.exp(0.5), rtol=1e-2)


def test_more_states_than_steps_are_refused():
    with pytest.raises(UserError, match="frames=5.*3 steps"):
        Ode(heun, 3, frames=5)(
            None, Interpolant(), lambda x, t: x, jnp.ones((1, 1, 1, 1))
        )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Ode(steps=0), "steps=0"),
        (lambda: Ode(steps=-3), "steps=-3"),
        (lambda: Ode(steps=2.5), "steps=2.5"),
        (lambda: Ode(frames=-1), "frames=-1"),
        (lambda: Adams(0), "steps=0: a whole number, at least 1"),
        (lambda: Adams(corrections=0), "corrections=0"),
        (lambda: Adams(rtol=-1.0), "rtol=-1"),
        (lambda: AdaptiveOde(frames=1.5), "frames=1.5"),
        (lambda: AdaptiveOde(rtol=-1e-3), "rtol=-0.001"),
        (lambda: AdaptiveOde(atol=float("nan")), "atol=nan"),
        (lambda: AdaptiveOde(rtol=0, atol=0), "rtol=0"),
        (lambda: AdaptiveOde(max_steps=0), "max_steps=0"),
        (lambda: AdaptiveOde(diffrax.Euler()), "Euler.*Dopri5"),
        (lambda: AdaptiveOde(diffrax.Kvaerno3()), "Kvaerno3.*Dopri5"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    "sampler", [Ode(), AdaptiveOde(), Adams()], ids=["fixed", "adaptive", "adams"]
)
def test_a_diffusion_is_refused(sampler):
    with pytest.raises(UserError, match="Diffusion .* use Ancestral or Ddim"):
        sampler(None, Diffusion(), None, None)
