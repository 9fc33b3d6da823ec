"""MDT-L/2 (version 1) on ImageNet 256: 477.6M parameters."""

from configs.mdt_xl2 import get_config as mdt_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = mdt_xl2()
    c.model.update(**SIZES["L"])
    return c
