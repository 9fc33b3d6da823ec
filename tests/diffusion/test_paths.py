"""Paths and their slopes, against the recorded ones and in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.recorded import arrays, case, nchw, nhwc
from helpers.samplers import PATHS, assert_close

from sit_jax.diffusion.paths import (
    VP,
    gvp,
    interpolate,
    linear,
    path_derivatives,
    sde_diffusion_rate,
)

G = arrays("sit_transport")
FLOORS = case("sit_transport")["f32_vs_f64"]


def recorded(name):
    return G[name], FLOORS[name]


@pytest.mark.parametrize("name", PATHS)
def test_recorded_coefficients(name):
    path, t = PATHS[name], jnp.asarray(G["t"])
    (alpha, sigma), (d_alpha, d_sigma) = path(t), path_derivatives(path, t)
    ours = {
        "alpha": alpha,
        "sigma": sigma,
        "d_alpha": d_alpha,
        "d_sigma": d_sigma,
        "d_alpha_alpha_ratio": d_alpha / alpha,
        "drift_var": sde_diffusion_rate(path, t),
    }
    for key, value in ours.items():
        assert_close(value, *recorded(f"path.{name}.{key}"))


@pytest.mark.parametrize("name", PATHS)
def test_recorded_plan(name):
    path, at = PATHS[name], jnp.asarray(G["t"]).reshape(-1, 1, 1, 1)
    noise, data = nhwc(G["x0"]), nhwc(G["x1"])
    assert_close(nchw(interpolate(path, data, noise, at)), *recorded(f"path.{name}.xt"))
    d_alpha, d_sigma = path_derivatives(path, at)
    velocity = d_alpha * data + d_sigma * noise
    assert_close(nchw(velocity), *recorded(f"path.{name}.ut"))


def test_vp_keeps_its_digits_near_the_data():
    """1 - exp(..) would be wrong by 1e-4 to 6e-3 here."""
    t = np.float32(1 - np.array([1e-3, 1e-4, 1e-5]))
    s = 1 - t.astype(np.float64)
    log_alpha = -(s**2) * (20 - 0.1) / 4 - s * 0.1 / 2
    rate = s * (20 - 0.1) / 2 + 0.1 / 2
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    ours = (
        *VP()(jnp.asarray(t)),
        *path_derivatives(VP(), t),
        sde_diffusion_rate(VP(), t),
    )
    exact = (alpha, sigma, alpha * rate, -(alpha**2) * rate / sigma, rate)
    for mine, right in zip(ours, exact, strict=True):
        np.testing.assert_allclose(mine, right, rtol=1e-5)


def test_vp_at_the_noise_end():
    alpha, sigma = VP()(jnp.float32(0))
    np.testing.assert_allclose(alpha, 0.0065716, rtol=1e-5)
    np.testing.assert_allclose(sigma, 1.0, rtol=3e-5)
    # another range of beta: exp(-(beta_min + beta_max) / 4)
    np.testing.assert_allclose(VP(1, 5)(jnp.float32(0))[0], np.exp(-1.5), rtol=1e-6)


@pytest.mark.parametrize("path", [linear, gvp])
def test_time_0_is_noise_and_time_1_is_data(path):
    noise, data = jnp.full((2, 3), 5.0), jnp.full((2, 3), -7.0)
    # gvp's cos(pi / 2) is 4e-8 in float32
    for t, end in ((0.0, noise), (1.0, data)):
        np.testing.assert_allclose(interpolate(path, data, noise, t), end, rtol=1e-6)
