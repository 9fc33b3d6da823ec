"""Sources whose records tell what was done to them; without JAX, for new processes."""

import os
import time

import numpy as np

from sit_jax.data.images import CorruptImage
from sit_jax.data.sources import DataSource


class Numbered(DataSource):
    """Record i says i, so that a batch shows which records it is made of."""

    shape, classes = (1, 1, 1), 3

    def __init__(self, length, delay=0.0):
        self.length, self.delay = length, delay

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        time.sleep(self.delay)
        latent = np.full(self.shape, i, np.float32)
        return {"latent": latent, "label": np.int32(i % self.classes)}


class Single(Numbered):
    """One record, to be spoilt by a test."""

    def __init__(self, **record):
        super().__init__(1)
        self.record = {"latent": np.zeros((1, 1, 1), np.float32), "label": 0} | record

    def __getitem__(self, i):
        return {k: v for k, v in self.record.items() if v is not None}


class Marked(Numbered):
    """Record i is i on the left and 255 on the right; some cannot be read."""

    shape = (1, 2, 1)

    def __init__(self, length, corrupt=(), fraction=1.0, flip=True):
        super().__init__(length)
        self.corrupt, self.flip = set(corrupt), flip
        self.max_corrupt_fraction = fraction

    def __getitem__(self, i):
        if i in self.corrupt:
            raise CorruptImage(f"{i}.jpg: torn")
        image = np.array([[[i], [255]]], np.uint8)
        return {"image": image, "label": np.int32(i % 3)}

    def flipped(self, i):
        record = self[i]
        return record | {"image": record["image"][:, ::-1]}


class Deadly(Marked):
    """Ends its process."""

    def __getitem__(self, i):
        os._exit(3)


class Reporting(Marked):
    """Says in its label which process it is."""

    classes = 2**30

    def __getitem__(self, i):
        return super().__getitem__(i) | {"label": np.int32(os.getpid())}
