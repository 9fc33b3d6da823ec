"""SiT-XL/2 sampled by its ODE as the authors did: 125 steps of Heun's method.

125 steps with guidance 1.5 is what the released weights were evaluated with, by an
author's word in SiT's issue 18.
"""

from configs.sit_xl2 import get_config as sit_xl2
from sit_jax.config import spec
from sit_jax.samplers.fixed_ode import FixedStepODE, heun


def get_config():
    c = sit_xl2()
    c.sampler = spec(FixedStepODE, method=heun, steps=125)
    c.guidance = 1.5
    return c
