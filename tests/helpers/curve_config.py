"""The run of small.py as a config file, with a curve of distances by a toy network."""

import numpy as np
from helpers import small

from sit_jax.config import spec


class Toy:
    """Twelve pixels are the features."""

    pipeline, batch_size, is_inception = {"network": "toy"}, 32, False

    def __call__(self, batches):
        for images in batches:
            yield {"pool": images.reshape(len(images), -1)[:, :12] / np.float32(255)}


class Pictures(list):
    """Random ones, in the place of a data set."""

    def __init__(self):
        rng = np.random.default_rng(0)
        super().__init__({"image": i} for i in rng.integers(0, 256, (40, 4, 4, 1)))


def config(**fields):
    c = small.config(preview=0, steps=8)
    c.evaluate_every, c.evaluate_images = 3, 20
    c.features, c.reference = spec(Toy), spec(Pictures)
    c.update(fields)
    return c


def get_config():
    return config()
