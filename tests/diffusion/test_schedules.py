"""Betas, and the steps a shorter chain visits, against the recorded tables."""

import numpy as np
import pytest
from helpers.recorded import arrays

from sit_jax.diffusion.schedules import (
    DDIMSpacing,
    cosine_betas,
    linear_betas,
    space_timesteps,
)
from sit_jax.errors import UserError


def test_linear_betas():
    betas = linear_betas(1000)
    assert betas.dtype == np.float64 and betas.shape == (1000,)
    assert betas[0] == 1e-4 and betas[-1] == 0.02
    np.testing.assert_allclose(np.diff(betas), 0.0199 / 999, rtol=1e-10)
    # the whole chain destroys about as much, so half the steps are twice as large
    np.testing.assert_allclose(linear_betas(500)[[0, -1]], [2e-4, 0.04], rtol=1e-15)


def test_cosine_betas():
    betas = cosine_betas(1000)
    assert betas.dtype == np.float64 and betas.shape == (1000,)
    # published to seven digits
    np.testing.assert_allclose(betas[0], 4.128422e-5, rtol=2e-7)
    assert betas[-1] == 0.999 and np.all(np.diff(betas) >= 0)
    half = np.cumprod(1 - betas)[499]
    exact = np.cos((0.5 + 0.008) / 1.008 * np.pi / 2) ** 2
    exact /= np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(half, exact, rtol=1e-12)


@pytest.mark.parametrize(
    "name, spacing", [("10", 10), ("50", 50), ("ddim25", DDIMSpacing(25))]
)
def test_recorded_timestep_maps(name, spacing):
    recorded = arrays("dit_tables")[f"{name}.timestep_map"]
    assert space_timesteps(1000, spacing) == tuple(recorded)


def test_ddim_spacing_is_a_plain_stride():
    assert space_timesteps(1000, DDIMSpacing(50)) == tuple(range(0, 1000, 20))
    assert space_timesteps(1000, DDIMSpacing(1000)) == tuple(range(1000))


def test_sections_share_the_chain():
    """1000 = 334 + 333 + 333: the first sections are the longer ones."""
    steps = space_timesteps(1000, (10, 15, 20))
    # each section gives both its ends
    assert steps[0] == 0 and steps[9:11] == (333, 334)
    assert steps[24:26] == (666, 667) and steps[44:] == (999,)


def test_places_are_summed_and_rounded_half_to_even():
    # 10 * (999 / 20) is 499.5, which rounds to 500; the sum of ten falls just short
    assert space_timesteps(1000, 21)[10] == 499
    # the middle of six steps lies at 2.5
    assert space_timesteps(6, 3) == (0, 2, 5)


def test_ends_of_the_range():
    assert space_timesteps(1000, 1000) == tuple(range(1000))
    assert space_timesteps(1000, 1) == (0,)
    assert space_timesteps(1000, (1, 0, 1)) == (0, 667)
    assert space_timesteps(1000, np.int64(10)) == space_timesteps(1000, (10,))


@pytest.mark.parametrize(
    "spacing, words",
    [
        *((spacing, "at least one") for spacing in (0, -5, (), (0, 0), (5, -1))),
        (1001, "1001 steps of a diffusion of 1000"),
        ((10, 400, 10), "section 2 of 3 has 333 of the 1000 steps, 400 asked"),
        (12.5, "steps=12.5 is not a spacing"),
        ("ddim50", "'ddim50' is not a spacing"),
        ([10, 10], "not a spacing"),
        (DDIMSpacing(300), "no stride visits 300 .*; nearest are 334 and 250"),
    ],
)
def test_impossible_spacings(spacing, words):
    with pytest.raises(UserError, match=words):
        space_timesteps(1000, spacing)


@pytest.mark.parametrize("steps", [0, -1])
def test_impossible_ddim_spacings(steps):
    with pytest.raises(UserError, match="DDIMSpacing"):
        DDIMSpacing(steps)
