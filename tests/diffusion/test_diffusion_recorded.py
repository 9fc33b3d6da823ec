"""The Gaussian diffusion against recorded tables, losses and posteriors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import diffusions
from helpers.diffusions import (
    EVERY,
    FULL,
    SPACINGS,
    VARIANTS,
    batch,
    close,
    close_loss,
    loss_of,
    posterior_of,
)
from helpers.recorded import arrays, case, nchw, nhwc

from sit_jax.diffusion import gaussian as d
from sit_jax.diffusion.paths import expand_dims_like

model = diffusions.model


@pytest.fixture
def network(model):
    """net(x, t) with the recorded weights, labels and frequency table."""
    labels = jnp.asarray(arrays("dit_training_losses")["y"])
    return lambda x, t: model(x, t, labels)


@pytest.mark.parametrize("name", SPACINGS)
def test_recorded_tables(name):
    process = FULL.respace(SPACINGS[name])
    g = {k.removeprefix(f"{name}."): v for k, v in arrays("dit_tables").items()}
    rows = g["idx"] if name == "full" else np.arange(len(process.betas))
    (alpha, sigma), bar = (
        process.float64_path(np.arange(len(process.betas))),
        process.alpha_bar,
    )
    ours = {
        "timestep_map": np.array(process.timestep_map),
        "betas": process.betas,
        "alphas_cumprod": bar[1:],
        "alphas_cumprod_prev": bar[:-1],
        "alphas_cumprod_next": np.append(bar[2:], 0.0),
        "sqrt_alphas_cumprod": alpha,
        "sqrt_one_minus_alphas_cumprod": sigma,
        "log_one_minus_alphas_cumprod": np.log(1 - bar[1:]),
        "sqrt_recip_alphas_cumprod": 1 / alpha,
        "sqrt_recipm1_alphas_cumprod": sigma / alpha,
        "posterior_variance": process.q_posterior[2],
        "posterior_log_variance_clipped": process.log_variances[0],
        "posterior_mean_coef1": process.q_posterior[0],
        "posterior_mean_coef2": process.q_posterior[1],
    }
    for key, table in ours.items():
        # float64 throughout: what is left is the order of a few roundings
        np.testing.assert_allclose(table[rows], g[key], rtol=1e-12, err_msg=key)
    sums = case("dit_tables")["respacings"][name]["sums"]
    for key in sums:
        np.testing.assert_allclose(ours[key].sum(), sums[key], rtol=1e-12, err_msg=key)


def test_published_figures():
    np.testing.assert_allclose(FULL.float64_path(999)[0] ** 2, 4.0358298e-5, rtol=1e-8)
    np.testing.assert_allclose(FULL.float64_path(499)[0] ** 2, 0.07858724, rtol=1e-7)
    np.testing.assert_allclose(1 / FULL.float64_path(999)[0], 157.410457, rtol=1e-8)
    np.testing.assert_allclose(FULL.log_variances[0][:2], -9.81672514, rtol=1e-9)


def test_tables_are_rounded_once():
    """Gathered in float64 and cast, not computed from float32 tables."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    exact = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    for ours, table in zip(FULL.path(EVERY), exact, strict=True):
        # the betas are rebuilt from alpha_bar, hence one unit in the last place
        np.testing.assert_array_max_ulp(np.asarray(ours), np.float32(table), 1)
    np.testing.assert_array_equal(FULL.path(jnp.array([-1])), [[1.0], [0.0]])


@pytest.mark.parametrize("name", VARIANTS)
def test_recorded_losses_of_a_fixed_output(name):
    process, g = VARIANTS[name], arrays("dit_training_losses")
    out = nhwc(g["fixed_model_output"])
    out = out[..., :4] if name in ("v4", "v5") else out
    ours = loss_of(process, out, *batch())
    floors = case("dit_training_losses")["runs"][int(name[1])]["f32_vs_f64"]
    names = [key.removeprefix("fixed.") for key in floors if key.startswith("fixed")]
    assert set(names) <= set(ours) and ("vb" in ours) == (name not in ("v4", "v5"))
    for key in names:
        close_loss(ours[key], g[f"{name}.fixed.{key}"], floors[f"fixed.{key}"][0])


def test_recorded_losses_of_the_network(network):
    losses = {name: partial(p.losses, network) for name, p in VARIANTS.items()}
    half = lambda x, t: network(x, t)[..., :4]
    losses |= {name: partial(VARIANTS[name].losses, half) for name in ("v4", "v5")}
    ours = jax.jit(lambda *b: {name: loss(*b) for name, loss in losses.items()})
    ours, g = ours(*batch()), arrays("dit_training_losses")
    for run in case("dit_training_losses")["runs"]:
        for key, (floor, _) in run["f32_vs_f64"].items():
            if key.startswith("model."):
                theirs = g[f"{run['id']}.{key}"]
                close_loss(ours[run["id"]][key.removeprefix("model.")], theirs, floor)


@pytest.mark.parametrize("name", ["v0", "v3", "v4", "v5"])
@pytest.mark.parametrize("clip", [False, True])
def test_recorded_posteriors(name, clip):
    process, g = VARIANTS[name], arrays("dit_training_losses")
    out = nhwc(g["fixed_model_output"])
    out = out[..., :4] if name in ("v4", "v5") else out
    x, t = nhwc(g[f"{name}.x_t"]), batch()[2]
    mean, log_var, data = posterior_of(process, out, x, t, clip)
    ending = f"clip{int(clip)}"
    close(nchw(mean), g[f"{name}.p.mean.{ending}"])
    close(nchw(data), g[f"{name}.p.pred_xstart.{ending}"])
    theirs = g[f"{name}.p.log_variance.{ending}"]
    log_var = log_var[:, 0, 0, 0] if theirs.ndim == 1 else nchw(log_var)
    close(log_var, theirs)


def test_recorded_mixture_and_true_step():
    g, (data, noise, t) = arrays("dit_training_losses"), batch()
    seen = []
    net = lambda x, t: seen.append((x, t)) or jnp.zeros((4, 8, 8, 8))
    FULL.losses(net, data, noise, t)
    close(nchw(seen[0][0]), g["v0.x_t"])
    np.testing.assert_array_equal(seen[0][1], t)
    on_data, on_x, _ = (
        d.lookup(table, expand_dims_like(t, data)) for table in FULL.q_posterior
    )
    close(nchw(on_data * data + on_x * seen[0][0]), g["v0.q_posterior_mean"])
    log_var = d.lookup(FULL.log_variances[0], t)
    close(log_var, g["v0.q_posterior_log_variance"])
