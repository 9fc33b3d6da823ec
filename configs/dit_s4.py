"""DiT-S/4 on ImageNet 256: 32.9M parameters, 1.41 GMAC an image."""

from configs.dit_xl2 import get_config as dit_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = dit_xl2()
    c.model.update(**SIZES["S"], patch=4)
    return c
