"""SiT-XL/2 on latents that extract_features.py made: --config.source.path=DIR.

The classes are those of the cache; --init begins with weights of any number of them.
"""

from sit_jax.config import spec
from sit_jax.data.latent_cache import LatentCache
from sit_jax.recipes import sit


def get_config():
    c = sit()
    c.source = spec(LatentCache, path="data/latents")
    c.count_classes = True
    return c
