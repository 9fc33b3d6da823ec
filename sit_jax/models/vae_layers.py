"""Layers of Stable Diffusion's autoencoder; images are [B, H, W, D].

Parameters are always float32. `dtype` is what convolutions and the residual stream run
in; norms and what has no dtype stay in float32.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sit_jax.models.attention import attend

QUERIES = 4096  # that attend at a time: more would need too large a table of scores


class Residual(nn.Module):
    """x [B, H, W, ..] -> [B, H, W, width]."""

    width: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        y = nn.silu(Norm(self.groups, name="norm1")(x))
        y = conv(self.width, "conv1", self.dtype)(y)
        y = nn.silu(Norm(self.groups, name="norm2")(y))
        y = conv(self.width, "conv2", self.dtype)(y)
        if x.shape[-1] != self.width:
            x = pointwise(self.width, "shortcut", self.dtype)(x)
        return x + y


class Double(nn.Module):
    """x [B, H, W, D] -> [B, 2H, 2W, D]: every pixel four times, then a 3 x 3 kernel.

    Computed before the repetition: an output pixel sees only 2 x 2 different inputs,
    through sums of the kernel's entries, so 4 products do the work of 9.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (3, 3, width, width))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        rows = _phases(kernel, 0)
        kernels = [[k.astype(self.dtype) for k in _phases(row, 1)] for row in rows]
        x = x.astype(self.dtype)
        pixels = [[_phase(x, kernels[a][b], a, b) for b in (0, 1)] for a in (0, 1)]
        x = rearrange(jnp.asarray(pixels), "p q b h w d -> b (h p) (w q) d")
        return x + bias.astype(self.dtype)[None, None, None]


class Middle(nn.Module):
    """The lowest resolution, where every pixel sees every other."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        size = (self.groups, self.dtype)
        x = Residual(x.shape[-1], *size, name="before")(x)
        x = PixelAttention(*size, name="attention")(x)
        return Residual(x.shape[-1], *size, name="after")(x)


class PixelAttention(nn.Module):
    """x [B, H, W, D] -> the same: one head as wide as there are channels."""

    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        batch, height, width, channels = x.shape
        y = Norm(self.groups, name="norm")(x)
        y = y.reshape(batch, height * width, 1, channels)
        q, k, v = (nn.Dense(channels, dtype=self.dtype, name=n)(y) for n in "qkv")
        y = nn.Dense(channels, dtype=self.dtype, name="out")(_attend(q, k, v))
        return x + y.reshape(x.shape)


class Norm(nn.Module):
    """Group norm with an affine part, in float32: x [B, H, W, D] -> the same shape."""

    groups: int
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x, given=None):
        """given: (mean, variance) [B, D] to take instead of x's own."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = x.astype(jnp.float32)
        mean, var = moments(x, self.groups) if given is None else given
        factor = scale[None] / jnp.sqrt(var + self.epsilon)
        return (x - mean[:, None, None]) * factor[:, None, None] + bias[
            None, None, None
        ]


def moments(x, groups, weights=None):
    """x [B, H, W, D] -> mean, variance [B, D] of the group that a channel is of.

    In two passes: E[x^2] - E[x]^2, which torch takes on a CPU where channels are last
    in memory, cancels in float32. weights [H, W] of the pixels are equal by default.
    """
    mean = _over_group(_over_pixels(x, weights), groups)
    off = (x - mean[:, None, None]) ** 2
    return mean, _over_group(_over_pixels(off, weights), groups)


def _over_pixels(x, weights):
    if weights is None:
        return x.mean((1, 2))
    return (x * weights[None, :, :, None]).sum((1, 2)) / weights.sum()


def _over_group(x, groups):
    """[B, D] -> [B, D], averaged over the channels of a group."""
    means = x.reshape(len(x), groups, -1).mean(-1)
    return means.repeat(x.shape[-1] // groups, axis=-1)


def _phases(kernel, axis):
    """Kernel of 3 entries along axis -> kernels of 2, for even and for odd pixels."""
    first, middle, last = jnp.split(kernel, 3, axis)
    even, odd = (first, middle + last), (first + middle, last)
    return jnp.concatenate(even, axis), jnp.concatenate(odd, axis)


def _phase(x, kernel, row, column):
    padding = ((1 - row, row), (1 - column, column))
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=layout
    )


def _attend(q, k, v):
    if q.shape[1] <= QUERIES:
        return attend(q, k, v)
    one = lambda q: attend(q[:, None], k, v)[:, 0]
    return jax.lax.map(one, q.swapaxes(0, 1), batch_size=QUERIES).swapaxes(0, 1)


def conv(width, name, dtype=jnp.float32):
    return nn.Conv(width, (3, 3), padding=1, dtype=dtype, name=name)


def pointwise(width, name, dtype=jnp.float32):
    return nn.Conv(width, (1, 1), dtype=dtype, name=name)


def halve(width, name, dtype):
    """Every second pixel, padded on the right and at the bottom only."""
    padding = ((0, 1), (0, 1))
    return nn.Conv(width, (3, 3), (2, 2), padding, dtype=dtype, name=name)
