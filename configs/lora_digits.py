"""Adapters that teach the digits of configs/digits.py a look it has not seen.

python train.py --config configs/lora_digits.py --init runs/digits --workdir runs/lora
White digits on black become black ones on white: docs/evidence/results.md has figures.
"""

import optax

from configs.digits import get_config as digits
from sit_jax.adapters.lora import LoRA
from sit_jax.config import spec
from sit_jax.data.sources import Digits, ImageTransform, invert


def get_config():
    c = digits()
    c.adapter = spec(LoRA, targets=r"(blocks|head)/.*", rank=8, alpha=16.0)
    c.source = spec(ImageTransform, source=spec(Digits), transform=invert)
    schedule = spec(
        optax.warmup_cosine_decay_schedule,
        init_value=0.0,
        peak_value=4e-3,
        warmup_steps=50,
        decay_steps=600,
    )
    c.optimizer = spec(optax.adamw, learning_rate=schedule, weight_decay=0.0)
    c.ema_decay = 0.98
    c.steps = 600
    c.save_every = 300
    c.sample_every = 300
    return c
