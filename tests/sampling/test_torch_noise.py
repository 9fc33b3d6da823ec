"""torch's noise on a CPU, as the released scripts come to draw it."""

import numpy as np
import pytest
from helpers.recorded import arrays, case, nchw

from sit_jax.errors import UserError
from sit_jax.models.dit import DiT, SiT
from sit_jax.sampling.noise import torch_noise, words_before_noise

G, CASE = arrays("torch_noise"), case("torch_noise")
TINY = {"SiT": SiT, "DiT": DiT}


def model_of(name):
    return TINY[name](depth=2, width=40, heads=4, patch=2, classes=10)


@pytest.mark.parametrize("run", CASE["pipeline"], ids=lambda run: run["key"])
def test_recorded_noise_after_building_the_network(run):
    model, theirs = model_of(run["model"]), G[run["key"]]
    assert words_before_noise(model, (8, 8, 4)) == run["draws_before_z"]
    start, steps = torch_noise(run["seed"], model, (8, 8, 4), len(theirs))
    # the kernels of another CPU differ in the last bits
    np.testing.assert_allclose(nchw(start), theirs, atol=1e-5)
    assert steps is None


@pytest.mark.parametrize("run", CASE["xl"], ids=lambda run: run["model"])
def test_the_released_networks_take_as_many_numbers(run):
    model = {"SiT-XL/2": SiT, "DiT-XL/2": DiT}[run["model"]]()
    assert words_before_noise(model, (32, 32, 4)) == run["draws_before_z"]


def test_steps_draw_after_the_start_for_both_halves():
    import torch

    model = model_of("SiT")
    start, steps = torch_noise(7, model, (4, 4, 4), 3, num_steps=2)
    generator = torch.Generator().manual_seed(7)
    torch.rand(words_before_noise(model, (4, 4, 4)), generator=generator)
    first = torch.randn(3, 4, 4, 4, generator=generator).numpy()
    kicks = [torch.randn(6, 4, 4, 4, generator=generator).numpy() for _ in range(2)]
    np.testing.assert_array_equal(nchw(start), first)
    for ours, theirs in zip(steps, kicks, strict=True):
        np.testing.assert_array_equal(nchw(ours), theirs[:3])


def test_too_much_noise_is_refused_before_it_is_drawn():
    with pytest.raises(UserError, match="250 steps of noise for 50000 images"):
        torch_noise(0, DiT(), (32, 32, 4), 50_000, num_steps=250)
