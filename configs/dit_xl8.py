"""DiT-XL/8 on ImageNet 256: 675.7M parameters, 7.39 GMAC an image."""

from configs.dit_xl2 import get_config as dit_xl2


def get_config():
    c = dit_xl2()
    c.model.patch = 8
    return c
