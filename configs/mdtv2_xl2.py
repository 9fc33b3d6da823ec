"""MDTv2-XL/2 on ImageNet 256: long skips, a drawn hidden share, Min-SNR and Adan.

Published: FID-50K 1.58, inception score 314.73 with guidance (the repository's README);
7.70 without it after 400K steps. Values are from sail-sg/MDT's main; in brackets where
there. Paper and repository differ in the hidden share (0.3 falling to 0.05, against 0.3
to 0.5; the author in issue 45: the latter) and in the length of training (1080 epochs
in tables, 4.6M steps elsewhere). The README said 2 decoder blocks until April 2024.
"""

from configs.mdt_xl2 import get_config as mdt_xl2
from sit_jax.config import spec
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.loss_weights import mdt_min_snr_loss
from sit_jax.models.dit import SIZES
from sit_jax.models.mdt import MDTv2
from sit_jax.training.optimizers import adan


def get_config():
    c = mdt_xl2()
    c.model = spec(MDTv2, patch=2, remat="dots", **SIZES["XL"])
    c.model.decoder = 4  # [run_sample.sh, infer_mdt.py and the weights]
    # [--mask_ratio 0.30; models.py: + 0.2 U(0,1)]
    c.model.update(mask_ratio=0.3, mask_ratio_range=0.2)
    c.process = spec(
        GaussianDiffusion, objective=mdt_min_snr_loss
    )  # [gaussian_diffusion.py]
    # [train_util.py: betas 0.98, 0.92, 0.99, max_grad_norm 1; image_train.py: lr 3e-4]
    c.optimizer = spec(adan, learning_rate=3e-4)
    c.clip = 1.0
    c.log_every = 500  # [log_interval]
    c.steps = 4_600_000  # with batches of 256
    return c
