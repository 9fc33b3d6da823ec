"""MDTv2-B/2 on ImageNet 256: 150.9M parameters.

Published: FID-50K 19.55 after 400K steps without guidance. The repository does not say
how deep the decoder is: 4 is what its model takes if not told.
"""

from configs.mdtv2_xl2 import get_config as mdtv2_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = mdtv2_xl2()
    c.model.update(**SIZES["B"])
    return c
