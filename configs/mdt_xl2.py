"""MDT-XL/2 (version 1) on ImageNet 256: DiT's diffusion, and a pass with hidden tokens.

Published: FID-50K 1.79, inception score 283.01 with guidance (the repository's README);
without it 6.23 after 6.5M steps, of which the paper tells and the code does not. Values
are from the branch mdtv1 of sail-sg/MDT; in brackets where there.
"""

import optax

from configs.dit_xl2 import get_config as dit_xl2
from sit_jax.config import spec
from sit_jax.diffusion.guidance import PowerCosine
from sit_jax.models.codec import Latents, to_uint8_mdt
from sit_jax.models.dit import SIZES
from sit_jax.models.mdt import MDT


def get_config():
    c = dit_xl2()
    # [image_sample.py: (x + 1) 127.5 to bytes, half a level less than DiT's rule]
    c.codec = spec(Latents, rounding=to_uint8_mdt)
    # [run.sh: --mask_ratio 0.30 --decode_layer 2, of all sizes; models.py: sizes]
    c.model = spec(MDT, patch=2, decoder=2, mask_ratio=0.3, remat="dots", **SIZES["XL"])
    # [image_train.py: lr 3e-4, weight_decay 0, lr_anneal_steps 0, which means constant;
    # train_util.py: torch's AdamW]. --lr_anneal_steps N would be spec(
    # optax.linear_schedule, init_value=3e-4, end_value=0.0, transition_steps=N,
    # transition_begin=1), for the released loop lowers the rate after its step.
    c.optimizer = spec(optax.adamw, learning_rate=3e-4, weight_decay=0.0)
    c.batch_size = 256  # [README: 64 GPUs x 4]
    c.ema_decay = 0.9999  # [image_train.py: ema_rate]; a tuple of rates keeps several
    c.timesteps = None  # [schedule_sampler uniform]; or spec(LossSecondMoment)
    c.log_quartiles = True  # [train_util.py]
    c.log_every = 10  # [log_interval]
    c.save_every = 10_000  # [save_interval]
    c.steps = 6_500_000  # paper
    # [image_sample.py: cfg_scale 3.8, scale_pow 4, 250 steps]
    with c.ignore_type():  # which was a number's
        c.guidance = spec(PowerCosine, scale=3.8, power=4.0)
    return c
