"""Densities of training times, against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from helpers.networks import quick_jit

from sit_jax.config import from_json, spec, to_json
from sit_jax.diffusion import predictions
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.timesteps import (
    DensityTimesteps,
    LogitNormal,
    Mode,
    cosmap,
    uniform,
)
from sit_jax.errors import UserError
from sit_jax.experiment import TRAINING, build_experiment

PROCESS = Interpolant(prediction=predictions.noise)  # 0.001 .. 0.999
N = 40_000


def logit_normal(t, mean=0.5, std=0.8):
    z = (np.log(t / (1 - t)) - mean) / std
    return np.exp(-z * z / 2) / (std * math.sqrt(2 * math.pi) * t * (1 - t))


def cosmap_density(t):
    """Esser et al., below equation 21."""
    return 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)


DENSITIES = {
    "uniform": (uniform, np.ones_like),
    "logit normal": (LogitNormal(0.5, 0.8), logit_normal),
    "cosmap": (cosmap, cosmap_density),
}


@pytest.mark.parametrize("name", DENSITIES)
def test_times_have_their_density_and_weights_its_inverse(name):
    quantile, density = DENSITIES[name]
    draw = quick_jit(
        lambda key: DensityTimesteps(quantile, True).sample(PROCESS, key, (), N)
    )
    t, weights = (np.asarray(x, float) for x in draw(jax.random.key(0)))
    unit = (t - 0.001) / 0.998
    # where a quantile is steep, the time's own rounding changes the density
    inner = (unit > 0.01) & (unit < 0.99)
    np.testing.assert_allclose(weights[inner], 1 / density(unit[inner]), rtol=3e-3)
    found, edges = np.histogram(unit, 20, (0, 1))
    fine = np.linspace(1e-6, 1 - 1e-6, 20_001)
    mass = np.histogram(fine, edges, weights=density(fine))[0] / len(fine)
    assert np.abs(found / N - mass).max() < 5 * math.sqrt(0.1 / N)


def test_weights_give_back_the_uniform_mean():
    draw = quick_jit(
        lambda key: DensityTimesteps(Mode(1.0), True).sample(PROCESS, key, (), N)
    )
    t, weights = draw(jax.random.key(1))
    assert float((weights * t**2).mean()) == pytest.approx(1 / 3, abs=0.01)
    assert float((t**2).mean()) < 0.31


def test_the_mode_is_in_the_middle_and_every_time_is_covered():
    """Equation 20 with their time, which is 1 - ours."""
    u, s = np.linspace(0, 1, 101), 1.29
    theirs = 1 - u - s * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    np.testing.assert_allclose(Mode(s)(jnp.asarray(u)), 1 - theirs, atol=1e-6)


def test_a_config_holds_them():
    c = small.config()
    c.timesteps = spec(
        DensityTimesteps, quantile=spec(LogitNormal, mean=0.3), weighted=True
    )
    found = build_experiment(from_json(to_json(c)), TRAINING).timesteps
    assert found == DensityTimesteps(LogitNormal(0.3), True)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: LogitNormal(std=0.0), "std=0.0"),
        (lambda: LogitNormal(mean=math.nan), "mean=nan"),
        (lambda: Mode(1.8), r"Mode\(scale=1.8\): beyond -1 .. 1.7519"),
        (lambda: DensityTimesteps().init(GaussianDiffusion()), "use LossSecondMoment"),
    ],
)
def test_impossible_ones_are_refused(make, said):
    with pytest.raises(UserError, match=said):
        make()
