"""SiT-XL/2 sampled by its ODE as the authors did: 125 steps of Heun's method.

Published: FID-50K 2.15 with guidance 1.5 (paper; the sampler is from SiT's issue 18).
"""

from configs.sit_xl2 import get_config as sit_xl2
from sit_jax.config import spec
from sit_jax.samplers.ode import Ode, heun


def get_config():
    c = sit_xl2()
    c.sampler = spec(Ode, method=heun, steps=125)
    c.guidance = 1.5
    return c
