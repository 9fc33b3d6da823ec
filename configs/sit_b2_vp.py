"""SiT-B/2 on the path of the variance-preserving diffusion, in continuous time."""

from configs.sit_b2 import get_config as sit_b2
from sit_jax.config import spec
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.paths import VP


def get_config():
    c = sit_b2()
    c.process = spec(Interpolant, path=VP())
    return c
