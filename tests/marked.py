"""Sources whose records tell what was done to them; without JAX, for new processes."""

import os
import sys

import numpy as np

from sit_jax.data.images import BrokenImage


class Marked:
    """Record i is i on the left and 255 on the right; some cannot be read."""

    shape, classes = (1, 2, 1), 3

    def __init__(self, length, broken=(), share=1.0, flip=True):
        self.length, self.broken, self.flip = length, set(broken), flip
        self.broken_share = share

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if i in self.broken:
            raise BrokenImage(f"{i}.jpg: torn")
        image = np.array([[[i], [255]]], np.uint8)
        return {"image": image, "label": np.int32(i % 3)}

    def mirrored(self, i):
        record = self[i]
        return record | {"image": record["image"][:, ::-1]}


class Spying(Marked):
    """Says in its label whether its process has imported JAX, or runs a script."""

    classes = 4

    def __getitem__(self, i):
        script = hasattr(sys.modules["__main__"], "__file__")
        found = ("jax" in sys.modules) + 2 * script
        return super().__getitem__(i) | {"label": np.int32(found)}


class Deadly(Marked):
    """Ends its process."""

    def __getitem__(self, i):
        os._exit(3)


class Reporting(Marked):
    """Says in its label which process it is."""

    classes = 2**30

    def __getitem__(self, i):
        return super().__getitem__(i) | {"label": np.int32(os.getpid())}
