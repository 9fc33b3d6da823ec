"""Other looks of the same records, for a network to be fine-tuned to."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


def inverted(image):
    """uint8 [H, W, C]: light where it was dark."""
    return 255 - image


def slanted(image, slope=0.5):
    """uint8 [H, W, C], leaning to the right: the middle row stays where it is."""
    height, width, _ = image.shape
    rows = np.arange(height)[:, None]
    at = np.arange(width)[None] - slope * ((height - 1) / 2 - rows)  # where from
    left = np.floor(at).astype(int)
    share = (at - left)[..., None]
    padded = np.pad(image.astype(np.float32), ((0, 0), (1, 1), (0, 0)))
    take = lambda column: padded[rows, np.clip(column + 1, 0, width + 1)]
    return np.round((1 - share) * take(left) + share * take(left + 1)).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Styled:
    """Another source's images, each as `style` makes it."""

    source: Any
    style: Callable = inverted

    @property
    def shape(self):
        return self.source.shape

    @property
    def classes(self):
        return self.source.classes

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        record = self.source[i]
        return {**record, "image": self.style(record["image"])}
