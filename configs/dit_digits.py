"""DiT on the handwritten digits of configs/digits.py: 1,000 steps of a diffusion.

For trying out DDPM and DDIM in minutes: --sampler ddim --steps 50.
"""

from configs.digits import get_config as digits
from sit_jax.config import spec
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.models.dit import DiT
from sit_jax.samplers.ddpm import DDPM


def get_config():
    c = digits()
    c.model = spec(DiT, depth=4, width=96, heads=4, patch=2, classes=10)
    c.process = spec(GaussianDiffusion)
    c.sampler = spec(DDPM, steps=250, clip=True)
    return c
