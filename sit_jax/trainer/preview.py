"""A sheet of samples that shows how far training is: one row of images a class."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.errors import UserError
from sit_jax.sampling.generation import Generator
from sit_jax.sampling.pictures import captions, sheet


class Preview:
    """The same `count` images, from the same noise, each time it is called.

    around: see generation.make_generate; names: of the classes, where known. A codec
    that makes no pictures is refused at construction.
    """

    def __init__(self, parts, mesh, seed, count, around=lambda fn: fn, names=None):
        made = jax.eval_shape(parts.codec.decode, jnp.zeros((1, *parts.shape)))
        if made.shape[-1] not in (1, 3):
            raise UserError(f"{made.shape[-1]} channels do not make a picture")
        self._columns, self._labels = rows(parts.model.classes, count)
        names = {str(y): name for y, name in enumerate(names or [])}
        self._captions = captions(self._labels, names)
        self._parts, self._mesh, self._seed = parts, mesh, seed
        self._draw, self._around = None, around

    def __call__(self, params):
        """-> uint8 picture, and the seconds it took, the first time with compiling."""
        begun = time.perf_counter()
        if self._draw is None:
            batch = min(len(self._labels), 32)
            how = {"around": self._around}
            self._draw = Generator(self._parts, params, self._mesh, batch, **how)
        drawn = self._draw(self._seed, self._labels, params=params)
        images = [np.asarray(self._parts.codec.decode(data)) for data, _ in drawn]
        images = np.concatenate(images)
        picture = sheet(images, self._columns, captions=self._captions)
        return picture, time.perf_counter() - begun


def rows(classes, count):
    """-> columns and labels int [N <= count] of a sheet with one class a row.

    With more classes than images, about square, and classes spread over all of them.
    """
    if count >= classes:
        columns = count // classes
        return columns, np.repeat(np.arange(classes), columns)
    labels = np.arange(count) * classes // count
    return max(round(count**0.5), 1), labels
