"""The Inception network of 2015 that FID is defined by, and how it is fed.

Szegedy et al. arXiv:1512.00567, in the variant of the file inception-2015-12-05: 1008
outputs, averages that leave padding out, and a maximum in the last block's pooling.
Other variants (torchvision's, half-pixel resizing) give other FIDs.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax

from sit_jax.models.inception_layers import BLOCKS, CLASSES, STEM, Conv

NAME = "inception-2015-12-05"
RESIZE = "TensorFlow 1 bilinear to 299, no half-pixel centres, no antialiasing"
SIDE = 299  # pixels
SPATIAL = 17 * 17 * 7  # features of an image for sFID
EPSILON = 1e-3  # of the batch norms


class Inception(nn.Module):
    """x [B, 299, 299, 3] from prepared() -> {"pool", "spatial", "logits"}.

    pool [B, 2048] is what FID compares, spatial [B, 2023] what sFID does: 7 channels of
    the graph's mixed_6/conv in the order row, column, channel. logits [B, 1008] are
    those of ADM's Inception Score, which has no bias. Everything in float32; run it
    under precision.EXACT, for what accelerators do by default moves FID.
    """

    @nn.compact
    def __call__(self, x):
        x = _run(STEM, x)
        for name, _, branches in BLOCKS:
            x = Mixed(branches, name=name)(x)
            if name == "Mixed_6d":  # its first branch is mixed_6/conv
                spatial = x[..., :7].reshape(len(x), SPATIAL)
        pool = x.mean((1, 2))
        logits = Classes(name="fc")(pool)
        return {"pool": pool, "spatial": spatial, "logits": logits}


def prepared(images):
    """uint8 [B, H, W, 3] -> float32 [B, 299, 299, 3] as the graph scales them."""
    return (resized(images) - 128) / 128


def resized(images, shape=(SIDE, SIDE)):
    """[B, H, W, C] -> float32 [B, *shape, C] by TensorFlow 1's ResizeBilinear.

    Pixel i of the result lies at i * (old / new) of the old ones: corners are aligned
    at one end only. Columns first, in its order of operations, so that the result is
    TensorFlow's but for the rounding of a fused multiply-add.
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):
        low, high, part = _neighbours(x.shape[axis], shape[axis - 1])
        a, b = jnp.take(x, low, axis), jnp.take(x, high, axis)
        x = a + (b - a) * jnp.expand_dims(part, tuple({0, 1, 2, 3} - {axis}))
    return x


class Mixed(nn.Module):
    """Branches side by side on the same input, their channels concatenated."""

    branches: tuple

    @nn.compact
    def __call__(self, x):
        return _run([self.branches], x)


class Unit(nn.Module):
    """A row of the table."""

    row: Conv

    @nn.compact
    def __call__(self, x):
        row, width = self.row, (self.row.width,)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        shape = (*row.kernel, x.shape[-1], row.width)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        scale, bias = self.param("scale", ones, width), self.param("bias", zeros, width)
        mean, var = self.param("mean", zeros, width), self.param("var", ones, width)
        x = _convolved(x, kernel, row)
        scale = scale / jnp.sqrt(var + EPSILON)
        shift = bias - mean * scale
        return nn.relu(x * scale[None, None, None] + shift[None, None, None])


class Classes(nn.Module):
    """[B, D] -> [B, 1008]; the bias stays with the weights and is not added."""

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], CLASSES)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        self.param("bias", nn.initializers.zeros, (CLASSES,))
        return x @ kernel


def _convolved(x, kernel, row):
    if row.kernel == (1, 1):  # a product, which XLA is quicker at on a CPU
        return x @ kernel[0, 0]
    axes = ("NHWC", "HWIO", "NHWC")
    strides = (row.stride, row.stride)
    return lax.conv_general_dilated(
        x, kernel, strides, row.padding, dimension_numbers=axes
    )


def _run(steps, x):
    """Steps of the table one after the other; called in a compact module."""
    for step in steps:
        if isinstance(step, Conv):
            x = Unit(step, name=step.name)(x)
        elif isinstance(step, tuple):
            x = jnp.concatenate([_run(branch, x) for branch in step], -1)
        else:
            x = step(x)
    return x


def _neighbours(old, new):
    """For each of the new pixels: the old ones around it, and how far between."""
    position = np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
    low = position.astype(np.int32)
    return low, np.minimum(low + 1, old - 1), position - low.astype(np.float32)
