"""Small pictures for tests: smooth, coloured, no two alike, and told apart by eye."""

import io

import numpy as np
from PIL import Image


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
