"""Adapters of rank 16 for SiT-XL/2's attention and MLPs; the base is given by --init.

python train.py --config configs/lora_xl2.py --init sit-xl2 --workdir runs/lora_xl2
A checkpoint of the adapters is 33 MB, and the optimizer's state twice that, where the
network has 2.7 GB. Learning rate and rank are PEFT's and diffusers' usual ones, not
tuned by us. QLoRA: --config.adapter.int8='.*blocks/.*'.
"""

import optax

from sit_jax.adapters.lora import LoRA
from sit_jax.config import spec
from sit_jax.recipes import sit


def get_config():
    c = sit()
    c.adapter = spec(LoRA, rank=16, alpha=16.0)
    c.optimizer = spec(optax.adamw, learning_rate=1e-4, weight_decay=0.0)
    c.clip = 1.0
    c.batch_size = 64
    c.ema_decay = 0.999
    c.steps = 20_000
    c.save_every = 1_000
    c.sample_every = 2_000
    return c
