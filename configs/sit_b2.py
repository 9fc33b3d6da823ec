"""SiT-B/2 on ImageNet 256: 130.5M parameters, 23.0 GMAC an image.

Published: FID-50K 33.0 after 400K steps, by SDE without guidance (paper; 34.7 in SiT's
issue 31).
"""

from configs.sit_xl2 import get_config as sit_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = sit_xl2()
    c.model.update(**SIZES["B"])
    return c
