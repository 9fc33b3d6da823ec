"""DiT-B/2 on ImageNet 256: 130.5M parameters, 23.0 GMAC an image."""

from configs.dit_xl2 import get_config as dit_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = dit_xl2()
    c.model.update(**SIZES["B"])
    return c
