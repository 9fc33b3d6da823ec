"""DiT-L/2 on ImageNet 256: 458.1M parameters, 80.7 GMAC an image."""

from configs.dit_xl2 import get_config as dit_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = dit_xl2()
    c.model.update(**SIZES["L"])
    return c
