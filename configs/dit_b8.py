"""DiT-B/8 on ImageNet 256: 130.9M parameters, 1.42 GMAC an image."""

from configs.dit_xl2 import get_config as dit_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = dit_xl2()
    c.model.update(**SIZES["B"], patch=8)
    return c
