"""SiT-S/2 on CIFAR-10's pixels: 32 x 32 x 3, 6.05 GMAC an image, 60k steps of 256.

Data: data/cifar10/train/<class>/*.jpg or .png, and test/ alike.
docs/evidence/results.md has a run of a smaller network on a CPU, with its command.
"""

import optax

from sit_jax.config import spec
from sit_jax.data.folders import CifarFolder
from sit_jax.models.codec import Pixels
from sit_jax.models.dit import SIZES, SiT
from sit_jax.recipes import sit
from sit_jax.samplers.fixed_ode import FixedStepODE, heun


def get_config():
    c = sit()
    c.shape = (32, 32, 3)
    c.model = spec(SiT, patch=2, classes=10, learn_sigma=False, **SIZES["S"])
    c.codec = spec(Pixels)
    c.source = spec(CifarFolder, path="data/cifar10")
    schedule = spec(
        optax.warmup_cosine_decay_schedule,
        init_value=0.0,
        peak_value=5e-4,
        warmup_steps=1_000,
        decay_steps=60_000,
    )
    c.optimizer = spec(optax.adamw, learning_rate=schedule, weight_decay=0.0)
    c.ema_decay = 0.9995
    c.steps = 60_000
    c.sample_every = 10_000
    c.preview = 100
    c.sampler = spec(FixedStepODE, method=heun, steps=25)
    c.guidance = 1.5
    return c
