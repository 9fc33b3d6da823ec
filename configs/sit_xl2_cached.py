"""SiT-XL/2 on latents that extract_features.py made: --config.source.path=DIR.

The classes are those of the cache; --init begins with weights of any number of them.
"""

from configs.sit_xl2 import get_config as sit_xl2
from sit_jax.config import spec
from sit_jax.data.cache import LatentCache


def get_config():
    c = sit_xl2()
    c.source = spec(LatentCache, path="data/latents")
    c.count_classes = True
    return c
