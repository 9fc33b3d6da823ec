"""Networks that pictures are judged by, under their names on the command line."""

import functools

from sit_jax import inception_weights
from sit_jax.digit_features import DigitFeatures
from sit_jax.features import inception_extractor
from sit_jax.sharding import make_mesh


@functools.cache
def judge(name, weights=None, batch_size=64):
    """-> an Extractor; name: of digit_features.WIDTHS; weights: a path, of Inception's.

    Made once, for it compiles.
    """
    if name == "digits":
        return DigitFeatures()
    found = inception_weights.load(weights)
    return inception_extractor(found, make_mesh(data=-1, fsdp=1), batch_size)
