"""The Inception network of 2015 that FID is defined by, and how it is fed.

Szegedy et al. arXiv:1512.00567, in the variant of the file inception-2015-12-05: 1008
outputs, averages that leave padding out, and a maximum in the last block's pooling.
Other variants (torchvision's, half-pixel resizing) give other FIDs.

The layers are a table. Each row has the layer's name in PyTorch (torch-fidelity's and
pytorch-fid's state dict) and its scope in the TensorFlow graph
classify_image_graph_def.pb; the rules of conversion follow from the table.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

NAME = "inception-2015-12-05"
RESIZE = "TensorFlow 1 bilinear to 299, no half-pixel centres, no antialiasing"
SIDE = 299  # pixels
POOL, CLASSES = 2048, 1008  # features of an image, outputs
SPATIAL = 17 * 17 * 7  # features of an image for sFID
EPSILON = 1e-3  # of the batch norms


class Conv(NamedTuple):
    """A row of the table: convolution without bias, batch norm, ReLU."""

    name: str
    scope: str
    width: int
    kernel: tuple
    stride: int = 1
    padding: str = "SAME"


def average_pool(x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """Returns means of 3 x 3 pixels; what lies outside does not count."""
    ones = np.ones((1, *x.shape[1:3], 1), x.dtype)
    return _reduce_3x3(_pad(x, 0), jnp.add) / _reduce_3x3(_pad(ones, 0), jnp.add)


def max_pool(x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
    """Returns maxima of 3 x 3 pixels."""
    return _reduce_3x3(_pad(x, -jnp.inf), jnp.maximum)


def max_pool_stride_2(x: Float[Array, "b h w d"]) -> Float[Array, "b _ _ d"]:
    """Returns maxima of 3 x 3 pixels around every second one, if inside the image."""
    return _reduce_3x3(x, jnp.maximum, stride=2)


def _pad(x, value):
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=value)


def _reduce_3x3(x, combine, stride=1):
    """Combines 3 x 3 pixels by shifted copies.

    XLA's reduce_window takes 2 to 6 times as long on a CPU.
    """
    for axis in (1, 2):
        span = (x.shape[axis] - 3) // stride * stride + 1
        a, b, c = (lax.slice_in_dim(x, i, i + span, stride, axis) for i in range(3))
        x = combine(combine(a, b), c)
    return x


def _block_a(pooled):
    return (
        [Conv("branch1x1", "conv", 64, (1, 1))],
        [
            Conv("branch5x5_1", "tower/conv", 48, (1, 1)),
            Conv("branch5x5_2", "tower/conv_1", 64, (5, 5)),
        ],
        [
            Conv("branch3x3dbl_1", "tower_1/conv", 64, (1, 1)),
            Conv("branch3x3dbl_2", "tower_1/conv_1", 96, (3, 3)),
            Conv("branch3x3dbl_3", "tower_1/conv_2", 96, (3, 3)),
        ],
        [average_pool, Conv("branch_pool", "tower_2/conv", pooled, (1, 1))],
    )


_BLOCK_B = (
    [Conv("branch3x3", "conv", 384, (3, 3), 2, "VALID")],
    [
        Conv("branch3x3dbl_1", "tower/conv", 64, (1, 1)),
        Conv("branch3x3dbl_2", "tower/conv_1", 96, (3, 3)),
        Conv("branch3x3dbl_3", "tower/conv_2", 96, (3, 3), 2, "VALID"),
    ],
    [max_pool_stride_2],
)


def _block_c(width):
    return (
        [Conv("branch1x1", "conv", 192, (1, 1))],
        [
            Conv("branch7x7_1", "tower/conv", width, (1, 1)),
            Conv("branch7x7_2", "tower/conv_1", width, (1, 7)),
            Conv("branch7x7_3", "tower/conv_2", 192, (7, 1)),
        ],
        [
            Conv("branch7x7dbl_1", "tower_1/conv", width, (1, 1)),
            Conv("branch7x7dbl_2", "tower_1/conv_1", width, (7, 1)),
            Conv("branch7x7dbl_3", "tower_1/conv_2", width, (1, 7)),
            Conv("branch7x7dbl_4", "tower_1/conv_3", width, (7, 1)),
            Conv("branch7x7dbl_5", "tower_1/conv_4", 192, (1, 7)),
        ],
        [average_pool, Conv("branch_pool", "tower_2/conv", 192, (1, 1))],
    )


_BLOCK_D = (
    [
        Conv("branch3x3_1", "tower/conv", 192, (1, 1)),
        Conv("branch3x3_2", "tower/conv_1", 320, (3, 3), 2, "VALID"),
    ],
    [
        Conv("branch7x7x3_1", "tower_1/conv", 192, (1, 1)),
        Conv("branch7x7x3_2", "tower_1/conv_1", 192, (1, 7)),
        Conv("branch7x7x3_3", "tower_1/conv_2", 192, (7, 1)),
        Conv("branch7x7x3_4", "tower_1/conv_3", 192, (3, 3), 2, "VALID"),
    ],
    [max_pool_stride_2],
)


def _block_e(pool):
    fork = lambda name, scope: (
        [Conv(f"{name}a", f"{scope}/mixed/conv", 384, (1, 3))],
        [Conv(f"{name}b", f"{scope}/mixed/conv_1", 384, (3, 1))],
    )
    return (
        [Conv("branch1x1", "conv", 320, (1, 1))],
        [
            Conv("branch3x3_1", "tower/conv", 384, (1, 1)),
            fork("branch3x3_2", "tower"),
        ],
        [
            Conv("branch3x3dbl_1", "tower_1/conv", 448, (1, 1)),
            Conv("branch3x3dbl_2", "tower_1/conv_1", 384, (3, 3)),
            fork("branch3x3dbl_3", "tower_1"),
        ],
        [pool, Conv("branch_pool", "tower_2/conv", 192, (1, 1))],
    )


STEM = (
    Conv("Conv2d_1a_3x3", "conv", 32, (3, 3), 2, "VALID"),
    Conv("Conv2d_2a_3x3", "conv_1", 32, (3, 3), 1, "VALID"),
    Conv("Conv2d_2b_3x3", "conv_2", 64, (3, 3)),
    max_pool_stride_2,
    Conv("Conv2d_3b_1x1", "conv_3", 80, (1, 1)),
    Conv("Conv2d_4a_3x3", "conv_4", 192, (3, 3), 1, "VALID"),
    max_pool_stride_2,
)
BLOCKS = (  # name, scope, branches: each a list of steps, a tuple among them a fork
    ("Mixed_5b", "mixed", _block_a(32)),
    ("Mixed_5c", "mixed_1", _block_a(64)),
    ("Mixed_5d", "mixed_2", _block_a(64)),
    ("Mixed_6a", "mixed_3", _BLOCK_B),
    ("Mixed_6b", "mixed_4", _block_c(128)),
    ("Mixed_6c", "mixed_5", _block_c(160)),
    ("Mixed_6d", "mixed_6", _block_c(160)),
    ("Mixed_6e", "mixed_7", _block_c(192)),
    ("Mixed_7a", "mixed_8", _BLOCK_D),
    ("Mixed_7b", "mixed_9", _block_e(average_pool)),
    ("Mixed_7c", "mixed_10", _block_e(max_pool)),  # a quirk of the released graph
)

_PARAMS = (  # in PyTorch, its layout, in TensorFlow, its layout, ours
    ("conv.weight", "oihw->hwio", "conv2d_params", "hwio->hwio", "kernel"),
    ("bn.weight", "c->c", "batchnorm/gamma", "c->c", "scale"),
    ("bn.bias", "c->c", "batchnorm/beta", "c->c", "bias"),
    ("bn.running_mean", "c->c", "batchnorm/moving_mean", "c->c", "mean"),
    ("bn.running_var", "c->c", "batchnorm/moving_variance", "c->c", "var"),
)


def _list_convs(
    steps: Any, width: int, torch: str = "", scope: str = "", flax: str = ""
) -> Iterator[tuple[str, str, str, tuple[int, ...]]]:
    """Yields the names and the kernel's shape of each convolution, in torch's order.

    Args:
      steps: rows of the table.
      width: channels before the first one.
      torch, scope, flax: what names begin with in PyTorch, TensorFlow and here.

    Returns:
      The number of channels after the last one.
    """
    for step in steps:
        if isinstance(step, Conv):
            shape = (*step.kernel, width, step.width)
            yield torch + step.name, scope + step.scope, flax + step.name, shape
            width = step.width
        elif isinstance(step, tuple):
            widths = []
            for branch in step:
                after = yield from _list_convs(branch, width, torch, scope, flax)
                widths.append(after)
            width = sum(widths)
    return width


def _list_all_convs():
    width = yield from _list_convs(STEM, 3)
    for name, scope, branches in BLOCKS:
        width = yield from _list_convs(
            [branches], width, f"{name}.", f"{scope}/", f"{name}/"
        )


CONVS = tuple(_list_all_convs())
RULES = tuple(
    (f"{torch}.{theirs}", f"{flax}/{ours}", layout)
    for torch, _, flax, _ in CONVS
    for theirs, layout, _, _, ours in _PARAMS
) + (("fc.weight", "fc/kernel", "oi->io"), ("fc.bias", "fc/bias", "o->o"))

TF_RULES = tuple(
    (f"{scope}/{theirs}", f"{flax}/{ours}", layout)
    for _, scope, flax, _ in CONVS
    for _, _, theirs, layout, ours in _PARAMS
) + (("softmax/weights", "fc/kernel", "io->io"), ("softmax/biases", "fc/bias", "o->o"))

SHAPES = (
    {  # of all parameters, by flax path
        f"{flax}/{ours}": shape if ours == "kernel" else shape[-1:]
        for _, _, flax, shape in CONVS
        for *_, ours in _PARAMS
    }
    | {"fc/kernel": (POOL, CLASSES), "fc/bias": (CLASSES,)}
)


class Inception(nn.Module):
    """The network, in float32.

    Run it under precision "exact", for what accelerators do by default moves FID.
    """

    @nn.compact
    def __call__(
        self, x: Float[Array, "b 299 299 3"]
    ) -> dict[str, Float[Array, "b _"]]:
        """Computes features and logits.

        Args:
          x: images as preprocess() returns them.

        Returns:
          "pool" [b, 2048] is what FID compares. "spatial" [b, 2023] is what sFID
          compares: 7 channels of the graph's mixed_6/conv in the order row, column,
          channel. "logits" [b, 1008] are those of ADM's Inception Score, which has no
          bias.
        """
        x = _run_steps(STEM, x)
        for name, _, branches in BLOCKS:
            x = Mixed(branches, name=name)(x)
            if name == "Mixed_6d":  # its first branch is mixed_6/conv
                spatial = x[..., :7].reshape(len(x), SPATIAL)
        pool = x.mean((1, 2))
        logits = Classes(name="fc")(pool)
        return {"pool": pool, "spatial": spatial, "logits": logits}


def preprocess(images: UInt8[Array, "b h w 3"]) -> Float[Array, "b 299 299 3"]:
    """Returns images as the graph resizes and scales them."""
    return (resize_tf1(images) - 128) / 128


def resize_tf1(
    images: Array, shape: tuple[int, int] = (SIDE, SIDE)
) -> Float[Array, "b h w c"]:
    """Resizes images [b, _, _, c] as TensorFlow 1's ResizeBilinear does.

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
    def __call__(self, x: Float[Array, "b h w _"]) -> Float[Array, "b _ _ d"]:
        return _run_steps([self.branches], x)


class ConvUnit(nn.Module):
    """A row of the table: convolution, batch norm with fixed statistics, ReLU."""

    row: Conv

    @nn.compact
    def __call__(self, x: Float[Array, "b h w _"]) -> Float[Array, "b _ _ d"]:
        row, width = self.row, (self.row.width,)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        shape = (*row.kernel, x.shape[-1], row.width)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        scale, bias = self.param("scale", ones, width), self.param("bias", zeros, width)
        mean, var = self.param("mean", zeros, width), self.param("var", ones, width)
        x = _convolve(x, kernel, row)
        scale = scale / jnp.sqrt(var + EPSILON)
        shift = bias - mean * scale
        return nn.relu(x * scale[None, None, None] + shift[None, None, None])


class Classes(nn.Module):
    """The logits' layer; its bias stays with the weights and is not added."""

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b 1008"]:
        shape = (x.shape[-1], CLASSES)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        self.param("bias", nn.initializers.zeros, (CLASSES,))
        return x @ kernel


def _convolve(x, kernel, row):
    if row.kernel == (1, 1):  # a product, which XLA is quicker at on a CPU
        return x @ kernel[0, 0]
    axes = ("NHWC", "HWIO", "NHWC")
    strides = (row.stride, row.stride)
    return lax.conv_general_dilated(
        x, kernel, strides, row.padding, dimension_numbers=axes
    )


def _run_steps(steps, x):
    """Runs steps of the table one after the other; call it in a compact module."""
    for step in steps:
        if isinstance(step, Conv):
            x = ConvUnit(step, name=step.name)(x)
        elif isinstance(step, tuple):
            x = jnp.concatenate([_run_steps(branch, x) for branch in step], -1)
        else:
            x = step(x)
    return x


def _neighbours(old, new):
    """Returns, for each new pixel, the old ones around it and how far between it is."""
    position = np.arange(new, dtype=np.float32) * (np.float32(old) / np.float32(new))
    low = position.astype(np.int32)
    return low, np.minimum(low + 1, old - 1), position - low.astype(np.float32)
