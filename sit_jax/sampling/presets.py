"""Lists published evaluations with their settings, figures and sources.

A figure is quoted with its source; tolerance is how far a rerun may be off before it
is another result: about 0.05 is what other noise alone does to an FID of 2 (needs of
50,000 images each), and the published ones are single runs.
"""

import dataclasses
from typing import Any

from sit_jax.config import spec
from sit_jax.diffusion.guidance import PowerCosine
from sit_jax.errors import UserError
from sit_jax.samplers import fixed_ode, sde
from sit_jax.samplers.adaptive_ode import AdaptiveODE
from sit_jax.samplers.ddpm import DDPM
from sit_jax.samplers.fixed_ode import FixedStepODE
from sit_jax.samplers.sde import SDE
from sit_jax.samplers.torchdiffeq import torchdiffeq_control

PICTURES = "207,360,387,974,88,979,417,279"  # the classes of DiT's and SiT's sample.py


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a published run drew with which settings; figure is words for people."""

    weights: str
    figure: str
    source: str
    sampler: Any
    guidance: Any = 1.5
    vae: str = "sd-vae-ft-ema"
    labels: str = "random"
    num: int | None = 50_000
    seed: int = 0
    rounding: str = "dit"
    tolerance: str = "0.05 in FID"


def released_ode() -> Any:
    """Returns dopri5 with the steps of SiT's scripts."""
    return spec(AdaptiveODE, rtol=1e-3, atol=1e-6, control=torchdiffeq_control)


PRESETS = {
    "sit-paper-ode": lambda: Preset(
        weights="sit-xl2-256",
        sampler=spec(FixedStepODE, method=fixed_ode.heun, steps=125),
        figure="FID-50K 2.15",
        source="SiT paper, ODE row (quoted from memory); settings: author, SiT#18",
    ),
    "sit-paper-sde": lambda: Preset(
        weights="sit-xl2-256",
        sampler=spec(
            SDE, steps=250, diffusion=sde.diffusion_sigma, last_step=sde.last_step_mean
        ),
        figure="FID-50K 2.06, inception score 270.27",
        source="SiT README; that it is the SDE: paper's SDE row (from memory)",
    ),
    "sit-repo-default": lambda: Preset(
        weights="sit-xl2-256",
        sampler=released_ode(),
        guidance=1.0,
        figure="FID-50K about 9.5",
        source="sample_ddp.py's defaults; figure: a user's, SiT#31",
        tolerance="0.3 in FID",
    ),
    "sit-repo-guided": lambda: Preset(
        weights="sit-xl2-256",
        sampler=released_ode(),
        figure="FID-50K 2.08",
        source="sample_ddp.py with --cfg-scale 1.5; figure: a user's, SiT#31",
    ),
    "sit-pictures": lambda: Preset(
        weights="sit-xl2-256",
        sampler=released_ode(),
        guidance=4.0,
        vae="sd-vae-ft-mse",
        labels=PICTURES,
        num=None,
        figure="the eight pictures of sample.py",
        source="SiT sample.py",
        tolerance="the same pictures, with --noise torch:0",
    ),
    "dit-256": lambda: Preset(
        weights="dit-xl2-256",
        sampler=spec(DDPM, steps=250),
        figure="FID-50K 2.27 (2.21 by the PyTorch port), inception score 278.24",
        source="DiT README",
    ),
    "dit-512": lambda: Preset(
        weights="dit-xl2-512",
        sampler=spec(DDPM, steps=250),
        figure="FID-50K 3.04, inception score 240.82",
        source="DiT README",
    ),
    "dit-pictures": lambda: Preset(
        weights="dit-xl2-256",
        sampler=spec(DDPM, steps=250),
        guidance=4.0,
        vae="sd-vae-ft-mse",
        labels=PICTURES,
        num=None,
        figure="the eight pictures of sample.py",
        source="DiT sample.py",
        tolerance="the same pictures, with --noise torch:0",
    ),
    "mdt": lambda: Preset(
        weights="mdt-xl2",
        sampler=spec(DDPM, steps=250),
        guidance=spec(PowerCosine, scale=3.8, power=4.0),
        rounding="mdt",
        figure="FID-50K 1.79, inception score 283.01",
        source="MDT README",
    ),
    "mdtv2": lambda: Preset(
        weights="mdtv2-xl2",
        sampler=spec(DDPM, steps=250),
        guidance=spec(PowerCosine, scale=3.8, power=4.0),
        rounding="mdt",
        figure="FID-50K 1.58, inception score 314.73",
        source="MDT README",
    ),
    "mdtv2-pictures": lambda: Preset(
        weights="mdtv2-xl2",
        sampler=spec(DDPM, steps=250),
        guidance=spec(PowerCosine, scale=4.0, power=0.01),
        vae="sd-vae-ft-mse",
        labels="19,23,106,108,278,282",
        num=None,
        seed=1,
        figure="the six pictures of infer_mdt.py",
        source="MDT infer_mdt.py",
        tolerance="pictures of these classes: its noise is CUDA's",
    ),
}


def get_preset(name: str) -> Preset:
    """Returns a preset by name; refuses an unknown name with the known ones."""
    if name not in PRESETS:
        raise UserError(f"--preset {name!r}: there are {', '.join(PRESETS)}")
    return PRESETS[name]()


def describe_preset(name: str, preset: Preset) -> str:
    """Returns a line about the published figure and its tolerance."""
    return (
        f"preset {name}: published {preset.figure} ({preset.source}); "
        f"a rerun agrees within {preset.tolerance}"
    )
