"""MDT-S/2 (version 1) on ImageNet 256: 35.8M parameters.

Published: FID-50K 50.26 in the paper's ablations; 57.01 after 300K steps elsewhere.
"""

from configs.mdt_xl2 import get_config as mdt_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = mdt_xl2()
    c.model.update(**SIZES["S"])
    return c
