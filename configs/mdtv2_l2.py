"""MDTv2-L/2 on ImageNet 256: 507.0M parameters.

The repository does not say how deep the decoder is: 4 is what its model takes if not
told.
"""

from configs.mdtv2_xl2 import get_config as mdtv2_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = mdtv2_xl2()
    c.model.update(**SIZES["L"])
    return c
