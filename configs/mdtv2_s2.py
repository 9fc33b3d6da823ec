"""MDTv2-S/2 on ImageNet 256: 38.5M parameters, a decoder of 6 blocks.

Published: FID-50K 39.50 after 400K steps without guidance. The README's copy of run.sh
has no --lr, which would be 3e-4. Both had a decoder of 4 until April 2024; the author
in issue 39: the paper's depths are right.
"""

from configs.mdtv2_xl2 import get_config as mdtv2_xl2
from sit_jax.models.dit import SIZES


def get_config():
    c = mdtv2_xl2()
    c.model.update(**SIZES["S"], decoder=6)  # [run.sh: --decode_layer 6]
    c.optimizer.learning_rate = 5e-4  # [run.sh: --lr 5e-4]
    return c
