"""SDE samplers: recorded runs with their noise, and exact statistics."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.recorded import arrays, case, nhwc
from helpers.samplers import (
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

from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.rng import recorded_noise
from sit_jax.errors import UserError
from sit_jax.samplers import sde
from sit_jax.samplers.sde import SDE

G = arrays("sit_sde")
RUNS = {run["id"]: run for run in case("sit_sde")["runs"]}
FORMS = {
    "constant": sde.diffusion_constant,
    "SBDM": sde.diffusion_sbdm,
    "sigma": sde.diffusion_sigma,
    "linear": sde.diffusion_linear,
    "decreasing": sde.diffusion_decreasing,
    "inccreasing-decreasing": sde.diffusion_increasing_decreasing,
}
LAST = {
    None: sde.last_step_none,
    "Mean": sde.last_step_mean,
    "Tweedie": sde.last_step_tweedie,
    "Euler": sde.last_step_euler,
}
METHODS = {"Euler": sde.euler_maruyama, "Heun": sde.heun}
# Every form, last step, method, path and prediction, other norms, and a guided run;
# r052 is SBDM with velocity, which needs a margin.
REPLAYED = ("r003 r024 r042 r052 r057 r061 r064 r070 r072 r078 r080 r086 r089").split()


def test_every_choice_is_replayed():
    runs = [RUNS[name] for name in REPLAYED]
    seen = lambda *fields: {tuple(run[f] for f in fields) for run in runs}
    assert seen("diffusion_form") == {(form,) for form in FORMS}
    assert seen("last_step") == {(last,) for last in LAST}
    assert seen("method") == {(method,) for method in METHODS}
    missing = {("GVP", "score")}  # not recorded
    assert seen("path", "prediction") == set(EVERY) - missing


@pytest.mark.parametrize("name", REPLAYED)
def test_recorded_runs(name):
    run = RUNS[name]
    margin = run["force_sample_eps"]
    process = Interpolant(
        PATHS[run["path"]], PREDICTS[run["prediction"]], sample_eps=margin
    )
    sampler = SDE(
        run["num_steps"],
        FORMS[run["diffusion_form"]],
        run["diffusion_norm"],
        LAST[run["last_step"]],
        run["last_step_size"],
        METHODS[run["method"]],
    )
    # with guidance torch gives each half noise of its own; the result is the first
    draws, want = nhwc(G[run["noise"]])[:, :2], G[f"{name}.final"][:2]
    data, stats = sampled(sampler, process, G["y"], nhwc(G["z"]), draws, run["cfg"])
    assert_close(data, want, run["f32_vs_f64"])
    # theirs asks the network twice for a drift, once for velocity or score alone
    twice = run["last_step"] in (None, "Mean")
    assert 2 * stats["evaluations"] == run["nfe"] + (not twice)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", PATHS)
def test_recorded_forms(path, form):
    golden, floors = arrays("sit_transport"), case("sit_transport")["f32_vs_f64"]
    for norm in (1.0, 0.7):
        name = f"path.{path}.diffusion.{form}.{norm}"
        w = FORMS[form](PATHS[path], jnp.asarray(golden["t"]), norm)
        assert_close(w, golden[name], floors[name])


@cache
def normal(*shape):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize("path, predicts", EVERY)
def test_gaussian_data(path, predicts):
    """Mean and spread of the samples are those of the data."""
    process, mean, std = Interpolant(PATHS[path], PREDICTS[predicts]), 1.5, 0.5
    form = {
        "velocity": sde.diffusion_sigma,
        "score": sde.diffusion_sbdm,
        "noise": sde.diffusion_constant,
    }
    sampler = SDE(400, form[predicts], last_step=sde.last_step_none)
    net, draws = gaussian(process, mean, std), normal(400, 2048, 2, 2, 1)
    run = once(lambda z, draws: sampler(net, process, z, recorded_noise(draws)))
    data = run(draws[-1], draws[:-1]).data
    # 8192 values: the standard errors are 0.0055 and 0.004, and the grid adds as much
    assert abs(float(data.mean()) - mean) < 0.025
    assert abs(float(data.std()) - std) < 0.02


@pytest.mark.parametrize(
    "path, predicts, method",
    [(*both, "Euler") for both in EVERY]
    + [(path, "velocity", "Heun") for path in PATHS],
)
def test_one_image_is_found(path, predicts, method):
    process = Interpolant(PATHS[path], PREDICTS[predicts])
    image = jnp.linspace(-1, 1, 16).reshape(1, 4, 4, 1)
    draws = normal(100, 3, 4, 4, 1)
    net = one_image(process, image)
    sampler = SDE(100, last_step=sde.last_step_tweedie, method=METHODS[method])
    data = once(lambda z: sampler(net, process, z, recorded_noise(draws)))(
        draws[-1]
    ).data
    # whatever noise is left, this network knows the image: exact but for rounding
    np.testing.assert_allclose(data, jnp.broadcast_to(image, data.shape), atol=1e-4)


@pytest.mark.parametrize(
    "path, last_step",
    [
        ("Linear", sde.last_step_none),
        ("GVP", sde.last_step_mean),
        ("VP", sde.last_step_euler),
    ],
)
def test_last_steps_come_near_the_image(path, last_step):
    process = Interpolant(PATHS[path])
    image = jnp.linspace(-1, 1, 16).reshape(1, 4, 4, 1)
    draws = normal(250, 3, 4, 4, 1)
    net, sampler = one_image(process, image), SDE(last_step=last_step)
    data = once(lambda z: sampler(net, process, z, recorded_noise(draws)))(
        draws[-1]
    ).data
    assert np.abs(data - image).mean() < 0.1


@pytest.mark.parametrize(
    "path, form",
    [("GVP", form) for form in FORMS] + [("Linear", "SBDM"), ("VP", "SBDM")],
)
def test_runs_are_finite_up_to_both_ends(path, form):
    """Heun asks at time 1 and SBDM near 0, where the original is not finite."""
    process = Interpolant(PATHS[path])
    draws = normal(9, 3, 4, 4, 1)
    sampler = SDE(9, FORMS[form], last_step=sde.last_step_none, method=sde.heun)
    net = lambda x, t: 0.5 * x - 1
    data = once(lambda z: sampler(net, process, z, recorded_noise(draws)))(
        draws[-1]
    ).data
    assert np.isfinite(data).all()


def toy(sampler, draws, net=lambda x, t: -x, **options):
    run = lambda z, draws: sampler(net, Interpolant(), z, recorded_noise(draws))
    return once(run, **options)(jnp.ones(draws.shape[1:]), draws)  # SamplerResult


def test_noise_is_what_draw_gives():
    draws = normal(9, 8, 2, 2, 1)
    one, other = toy(SDE(10), draws).data, toy(SDE(10), -draws).data
    assert np.abs(one - other).mean() > 0.1
    np.testing.assert_array_equal(one, toy(SDE(10), draws).data)
    # without diffusion it is the ODE, whatever is drawn
    still = [toy(SDE(10, norm=0.0), d).data for d in (draws, -draws)]
    np.testing.assert_array_equal(*still)


@pytest.mark.parametrize(
    "sampler, evaluations",
    [
        (SDE(10), 10),
        (SDE(10, last_step=sde.last_step_none), 9),
        (SDE(10, last_step=sde.last_step_tweedie, method=sde.heun), 19),
    ],
)
def test_evaluations_are_those_made(sampler, evaluations):
    net, calls = counted(lambda x, t: -x)
    result = toy(sampler, jnp.zeros((9, 1, 2, 2, 1)), net)
    jax.effects_barrier()
    assert len(calls) == result.num_evaluations == evaluations


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(steps=1), "steps=1"),
        (dict(steps=2.5), "steps=2.5"),
        (dict(norm=-1.0), "norm=-1.0"),
        (dict(norm=float("nan")), "norm=nan"),
        (dict(last=0.0), "last=0.0.*last_step=none"),
        (dict(last=1.0), "last=1.0"),
    ],
)
def test_impossible_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        SDE(**fields)


def test_a_diffusion_is_refused():
    with pytest.raises(UserError, match="Diffusion .* use DDPM or DDIM"):
        SDE()(None, GaussianDiffusion(), None)
