"""SiT on 1,297 scans of handwritten digits, 8x8 grey: minutes on two CPU cores."""

import optax

from sit_jax.config import spec
from sit_jax.data.sources import Digits
from sit_jax.evaluation.digits import DigitFeatures
from sit_jax.models.codec import Pixels
from sit_jax.models.dit import SiT
from sit_jax.recipes import sit


def get_config():
    c = sit()
    c.shape = (8, 8, 1)
    c.model = spec(SiT, depth=4, width=96, heads=4, patch=2, classes=10)
    c.model.learn_sigma = False
    c.codec = spec(Pixels)
    c.source = spec(Digits)
    schedule = spec(
        optax.warmup_cosine_decay_schedule,
        init_value=0.0,
        peak_value=2e-3,
        warmup_steps=50,
        decay_steps=1_500,
    )
    c.optimizer = spec(optax.adamw, learning_rate=schedule, weight_decay=0.0)
    c.batch_size = 64
    c.ema_decay = 0.995
    c.steps = 1_500
    c.save_every = 500
    c.sample_every = 500
    c.preview = 100
    c.evaluate_images = 500
    c.reference = spec(Digits, train=False)
    c.features = spec(DigitFeatures)
    c.guidance = 1.5
    return c
