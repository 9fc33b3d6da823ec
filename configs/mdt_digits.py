"""MDTv2 on 1,297 scans of handwritten digits, 8x8 grey: minutes on two CPU cores."""

import optax

from sit_jax.config import spec
from sit_jax.data.sources import Digits
from sit_jax.models.codec import Pixels
from sit_jax.models.mdt import MDTv2
from sit_jax.recipes import mdt
from sit_jax.samplers.ddpm import DDPM
from sit_jax.training.optimizers import adan


def get_config():
    c = mdt(version=2)
    c.shape = (8, 8, 1)
    c.model = spec(MDTv2, depth=4, width=96, heads=4, decoder=2, classes=10)
    c.codec = spec(Pixels)
    c.source = spec(Digits)
    anneal = spec(optax.linear_schedule, init_value=2e-3, end_value=0.0)
    anneal.update(transition_steps=1_500, transition_begin=1)  # as released
    c.optimizer = spec(adan, learning_rate=anneal)
    c.batch_size = 64
    c.ema_decay = 0.995
    c.steps = 1_500
    c.log_every = 50
    c.save_every = 500
    c.sample_every = 500
    c.preview = 100
    c.sampler = spec(DDPM, steps=50)
    c.guidance.scale = 1.5
    return c
