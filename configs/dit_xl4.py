"""DiT-XL/4 on ImageNet 256: 675.1M parameters, 29.0 GMAC an image."""

from configs.dit_xl2 import get_config as dit_xl2


def get_config():
    c = dit_xl2()
    c.model.patch = 4
    return c
