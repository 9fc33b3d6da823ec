"""DiT-L/8 on ImageNet 256: 458.6M parameters, 5.01 GMAC an image."""

from configs.dit_xl2 import get_config as dit_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = dit_xl2()
    c.model.update(**SIZES["L"], patch=8)
    return c
