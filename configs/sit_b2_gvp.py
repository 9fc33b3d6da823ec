"""SiT-B/2 on the trigonometric path, which keeps the variance at 1."""

from configs.sit_b2 import get_config as sit_b2
from sit_jax.config import spec
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.paths import gvp


def get_config():
    c = sit_b2()
    c.process = spec(Interpolant, path=gvp)
    return c
