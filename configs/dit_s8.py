"""DiT-S/8 on ImageNet 256: 33.1M parameters, 0.36 GMAC an image.

Published: FID-50K 153.6 after 400K steps without guidance (paper; about 167.5 with
another evaluator, DiT's issue 21).
"""

from configs.dit_xl2 import get_config as dit_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = dit_xl2()
    c.model.update(**SIZES["S"], patch=8)
    return c
