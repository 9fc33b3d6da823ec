"""SiT-S/2 on ImageNet 256: 33.0M parameters, 6.06 GMAC an image."""

from configs.sit_xl2 import get_config as sit_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = sit_xl2()
    c.model.update(**SIZES["S"])
    return c
