"""SiT-S/8 on ImageNet 256: 33.1M parameters, 0.36 GMAC an image."""

from configs.sit_xl2 import get_config as sit_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = sit_xl2()
    c.model.update(**SIZES["S"], patch=8)
    return c
