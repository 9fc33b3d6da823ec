"""SiT-L/8 on ImageNet 256: 458.6M parameters, 5.01 GMAC an image."""

from configs.sit_xl2 import get_config as sit_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = sit_xl2()
    c.model.update(**SIZES["L"], patch=8)
    return c
