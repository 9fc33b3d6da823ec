"""Small pictures, and sources whose records tell what was done to them; no JAX."""

import io
import os
import time

import numpy as np
from PIL import Image

from sit_jax.data.images import CorruptImage
from sit_jax.data.sources import DataSource


def pixels(seed, width=20, height=16):
    """-> uint8 [height, width, 3]: a gradient in each colour, and some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    slopes, start = rng.uniform(-4, 4, (2, 3)), rng.uniform(60, 190, 3)
    image = start + y[..., None] * slopes[0] + x[..., None] * slopes[1]
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def encoded(image, kind="PNG", **settings):
    """-> the bytes of an image file, from an array or a PIL image."""
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def png(seed, width=20, height=16):
    return encoded(pixels(seed, width, height))


def folder(root, classes=("ant", "bee", "cat"), each=3, size=(20, 16)):
    """root/<class>/<n>.png; image n of class c is pixels(10 * c + n)."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(each):
            (root / name / f"{i}.png").write_bytes(png(10 * label + i, *size))
    return root


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
