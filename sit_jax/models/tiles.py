"""Decoding images that are too large for memory, tile by tile.

The attention and the norms of the decoder see the whole image, so that tiles which know
only themselves differ in tone. Here the attention and the lower resolutions run on the
whole image, for they need little memory. The norms of the rest are measured beforehand
on patches that are spread over the image, decoded together, and then the same for all
tiles. What remains is a convolutional network that sees no farther than `margin`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.errors import UserError
from sit_jax.models.vae import first_tiled
from sit_jax.models.vae_layers import Norm, moments


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Square tiles of `size` latent pixels, blended linearly where they overlap.

    The norms are measured on patches x patches places, each a quarter of a tile wide,
    which takes the memory of 2 tiles. Where these cover the image the result is, seams
    included, that of decoding the whole to float32's rounding: 5e-7 at full size. On a
    larger one it is off by what the patches miss, without seams: by 2e-2 of the image
    (relative L2) at full size, of random weights, where they cover 44 % of latents
    whose contrast grows tenfold from one side to the other.
    """

    size: int = 64
    overlap: int = 8
    patches: int = 4

    def __call__(self, model, params, latents):
        """latents [B, h, w, C], unscaled -> images [B, H, W, 3] float32."""
        reach = margin(model)
        self._check(reach)
        finish = _Finish(model, {"params": params}, latents)
        rows, columns = (
            Windows(side, self.size, self.overlap, reach) for side in finish.sides
        )
        given = finish.measured(self.size // 4, self.patches, reach)

        def add(image, at):
            row, column, row_weights, column_weights = at
            tile = finish.tile((row, column), (rows.length, columns.length), given)
            tile = tile * (row_weights[:, None] * column_weights[None])[None, ..., None]
            begin = (0, row * model.factor, column * model.factor, 0)
            tile = tile + jax.lax.dynamic_slice(image, begin, tile.shape)
            return jax.lax.dynamic_update_slice(image, tile, begin), None

        i, j = np.indices((len(rows.starts), len(columns.starts))).reshape(2, -1)
        weights = rows.weights(model.factor)[i], columns.weights(model.factor)[j]
        places = (rows.starts[i], columns.starts[j], *weights)
        sides = (model.factor * side for side in finish.sides)
        image = jnp.zeros((len(latents), *sides, 3), jnp.float32)
        return jax.lax.scan(add, image, jax.tree.map(jnp.asarray, places))[0]

    def _check(self, reach):
        if self.patches < 1 or not 2 * reach <= self.overlap <= self.size // 2:
            raise UserError(
                f"{self}: at least one patch, and an overlap from {2 * reach}, twice "
                "as far as the decoder sees, to half the size"
            )


def margin(model):
    """Latent pixels around a tile that what is left to tiles sees: 3 at full size."""
    pixels, scale = 1, 1
    for level in reversed(range(first_tiled(model), len(model.channels))):
        pixels += scale * (2 * (model.layers + 1) + (level > 0))
        scale *= 2
    return -(-pixels // model.factor)


class Windows:
    """Overlapping windows along one side; the last one ends where the side does."""

    def __init__(self, side, size, overlap, reach):
        self.side, self.length = side, min(size, side)
        self.overlap, self.reach = overlap, reach
        step = self.length - overlap
        count = -(-(side - self.length) // max(step, 1)) + 1
        self.starts = np.minimum(np.arange(count) * step, side - self.length)

    def weights(self, scale):
        """float32 [windows, pixels], ramps; they add up to 1 in each pixel.

        Its margin inside the image, where a window sees too little, weighs nothing.
        """
        pixel = np.arange(self.length * scale) + 0.5
        distance = pixel - self.reach * scale
        width = max((self.overlap - 2 * self.reach) * scale, 0.5)
        begin = np.clip(distance / width, 0, 1)
        begin = np.where(self.starts[:, None] > 0, begin, 1)
        end = np.clip(distance[::-1] / width, 0, 1)
        end = np.where(self.starts[:, None] < self.side - self.length, end, 1)
        ramp, total = np.minimum(begin, end), np.zeros(self.side * scale)
        at = self.starts[:, None] * scale + np.arange(self.length * scale)
        np.add.at(total, at, ramp)
        return (ramp / total[at]).astype(np.float32)


class _Finish:
    """The tiled part of one decoding: model, weights, and what it starts from."""

    def __init__(self, model, variables, latents):
        self.model, self.variables = model, variables
        self.features = model.apply(variables, latents, method="begin")
        self.sides = latents.shape[1:3]
        self.scale = self.features.shape[1] // self.sides[0]

    def tile(self, begin, shape, given):
        """begin, shape in latent pixels -> image."""
        norm = lambda name, x: given[name]
        return self._run(self._cut(begin, shape), norm)

    def measured(self, width, count, reach):
        """-> {norm: (mean, variance) [B, D]} over count x count places in the image."""
        width = min(width, *self.sides)
        length = tuple(min(width + 2 * reach, side) for side in self.sides)
        rows, columns = (_patches(n, width, count, reach) for n in self.sides)
        cuts, counted = [], []
        for row, row_counts in zip(*rows, strict=True):
            for column, column_counts in zip(*columns, strict=True):
                cuts.append(self._cut((row, column), length))
                counted.append(np.outer(row_counts, column_counts))
        counted, found = np.stack(counted), {}

        def norm(name, x):
            scale = x.shape[1] // length[0]
            weights = counted.repeat(scale, 1).repeat(scale, 2)
            found[name] = _together(x, weights, self.model.groups)
            return [jnp.tile(each, (len(cuts), 1)) for each in found[name]]

        self._run(jnp.concatenate(cuts), norm)
        return found

    def _cut(self, begin, shape):
        begin = (0, *(self.scale * i for i in begin), 0)
        batch, *_, width = self.features.shape
        shape = (batch, *(self.scale * n for n in shape), width)
        return jax.lax.dynamic_slice(self.features, begin, shape)

    def _run(self, features, given):
        """given(name, x) -> the mean and variance that this norm is to take."""

        def watch(call, args, kwargs, context):
            norm = context.module
            if not isinstance(norm, Norm) or context.method_name != "__call__":
                return call(*args, **kwargs)
            return call(*args, given("/".join(norm.path), args[0]))

        with nn.intercept_methods(watch):
            return self.model.apply(self.variables, features, method="finish")


def _patches(side, width, count, reach):
    """-> starts of patches with their margins, and [patch, pixel]: how much it counts.

    Margins do not count and stay inside the image. What counts is spread evenly over
    it, and a pixel in several patches counts as one.
    """
    inner = np.linspace(0, side - width, count).round().astype(int)[:, None]
    length, total = min(width + 2 * reach, side), np.zeros(side)
    starts = np.clip(inner - reach, 0, side - length)
    at = starts + np.arange(length)
    counts = ((at >= inner) & (at < inner + width)).astype(np.float32)
    np.add.at(total, at, counts)
    return starts[:, 0], counts / np.maximum(total, 1)[at].astype(np.float32)


def _together(x, weights, groups):
    """x [n * B, h, w, D], weights [n, h, w] -> mean, variance [B, D] over n patches."""
    count, height, width = weights.shape
    x = x.astype(jnp.float32).reshape(count, -1, height, width, x.shape[-1])
    x = x.swapaxes(0, 1).reshape(-1, count * height, width, x.shape[-1])
    return moments(x, groups, jnp.asarray(weights).reshape(-1, width))
