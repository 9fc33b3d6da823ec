"""Published evaluations: each resolves to a whole recipe, and says its figure."""

import pytest

from sit_jax.config import from_json, to_json
from sit_jax.convert.pretrained import PRETRAINED
from sit_jax.diffusion.guidance import PowerCosine
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment
from sit_jax.models.codec import ROUNDINGS
from sit_jax.recipes import dit, sit
from sit_jax.samplers.adaptive_ode import AdaptiveODE
from sit_jax.samplers.ddpm import DDPM
from sit_jax.samplers.fixed_ode import FixedStepODE, heun
from sit_jax.samplers.sde import SDE, diffusion_sigma, last_step_mean
from sit_jax.samplers.torchdiffeq import torchdiffeq_control
from sit_jax.sampling import presets


def configured(name):
    chosen = presets.get_preset(name)
    config = (sit if name.startswith("sit") else dit)()
    with config.ignore_type():
        config.sampler, config.guidance = chosen.sampler, chosen.guidance
    return chosen, config


@pytest.mark.parametrize("name", presets.PRESETS)
def test_each_is_a_recipe_that_can_be_recorded(name):
    chosen, config = configured(name)
    parts = build_experiment(config)
    assert build_experiment(from_json(to_json(config))).sampler == parts.sampler
    assert chosen.weights in PRETRAINED and chosen.vae in PRETRAINED
    assert chosen.rounding in ROUNDINGS
    said = presets.describe_preset(name, chosen)
    assert chosen.figure in said and chosen.source in said and "\n" not in said


def test_the_papers_ode_takes_250_evaluations():
    _, config = configured("sit-paper-ode")
    assert (
        build_experiment(config).sampler == FixedStepODE(heun, 125)
        and config.guidance == 1.5
    )


def test_an_unknown_one_lists_the_known():
    with pytest.raises(UserError, match="there are sit-paper-ode, sit-paper-sde"):
        presets.get_preset("sit")


DOPRI5 = AdaptiveODE(rtol=1e-3, atol=1e-6, control=torchdiffeq_control)
DRAWN = dict(vae="sd-vae-ft-ema", labels="random", num=50_000, seed=0)
SHOWN = DRAWN | dict(
    vae="sd-vae-ft-mse", num=None, labels="207,360,387,974,88,979,417,279"
)
SPECIES = dict(vae="sd-vae-ft-mse", num=None, seed=1, labels="19,23,106,108,278,282")
# What the originals drew with: the defaults of sample.py, sample_ddp.py (SiT and DiT),
# image_sample.py and infer_mdt.py (MDT), and what SiT's author says of the paper's ODE.
PUBLISHED = {
    "sit-paper-ode": ("sit-xl2-256", FixedStepODE(heun, 125), 1.5, "dit", DRAWN),
    "sit-paper-sde": (
        "sit-xl2-256",
        SDE(
            steps=250,
            diffusion=diffusion_sigma,
            norm=1.0,
            last_step=last_step_mean,
            last=0.04,
        ),
        1.5,
        "dit",
        DRAWN,
    ),
    "sit-repo-default": ("sit-xl2-256", DOPRI5, 1.0, "dit", DRAWN),
    "sit-repo-guided": ("sit-xl2-256", DOPRI5, 1.5, "dit", DRAWN),
    "sit-pictures": ("sit-xl2-256", DOPRI5, 4.0, "dit", SHOWN),
    "dit-256": ("dit-xl2-256", DDPM(250), 1.5, "dit", DRAWN),
    "dit-512": ("dit-xl2-512", DDPM(250), 1.5, "dit", DRAWN),
    "dit-pictures": ("dit-xl2-256", DDPM(250), 4.0, "dit", SHOWN),
    "mdt": ("mdt-xl2", DDPM(250), PowerCosine(3.8, 4.0), "mdt", DRAWN),
    "mdtv2": ("mdtv2-xl2", DDPM(250), PowerCosine(3.8, 4.0), "mdt", DRAWN),
    "mdtv2-pictures": (
        "mdtv2-xl2",
        DDPM(250),
        PowerCosine(4.0, 0.01),
        "dit",  # a picture by save_image, which adds 0.5
        SPECIES,
    ),
}


@pytest.mark.parametrize("name", presets.PRESETS)
def test_each_has_the_values_of_the_original(name):
    weights, sampler, guidance, rounding, drawn = PUBLISHED[name]
    chosen, config = configured(name)
    parts = build_experiment(config)
    assert (chosen.weights, chosen.rounding) == (weights, rounding)
    assert {field: getattr(chosen, field) for field in drawn} == drawn
    assert parts.sampler == sampler
    assert parts.guidance == guidance and parts.guidance_channels == 3
