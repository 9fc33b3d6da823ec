"""SiT-L/4 on ImageNet 256: 458.1M parameters, 19.7 GMAC an image."""

from configs.sit_xl2 import get_config as sit_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = sit_xl2()
    c.model.update(**SIZES["L"], patch=4)
    return c
