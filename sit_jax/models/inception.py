"""The Inception network of 2015 that FID is defined by, and how it is fed.

Szegedy et al. arXiv:1512.00567, in the variant of the file inception-2015-12-05: 1008
outputs, averages that leave padding out, and a maximum in the last block's pooling.
Other variants (torchvision's, half-pixel resizing) give other FIDs.

The layers are a table. Their names in PyTorch (torch-fidelity's and pytorch-fid's state
dict), their scopes in the TensorFlow graph classify_image_graph_def.pb and the rules of
conversion follow from it.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt8

from sit_jax.typing import Params

NAME = "inception-2015-12-05"
RESIZE = "TensorFlow 1 bilinear to 299, no half-pixel centres, no antialiasing"
SIDE = 299  # pixels
POOL, CLASSES = 2048, 1008  # features of an image, outputs
SPATIAL = 17 * 17 * 7  # features of an image for sFID
EPSILON = 1e-3  # of the batch norms


class Conv(NamedTuple):
    """A layer: convolution without bias, batch norm, ReLU."""

    name: str  # in PyTorch; its path here has / for .
    scope: str  # in the TensorFlow graph
    kernel: tuple[int, int]
    width: int
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


# Blocks: the steps of each branch, a pool or a kernel, the number of its features, and
# perhaps stride and padding. A list of layers among the steps is a fork.


def _block_a(pooled):
    return {
        "branch1x1": [((1, 1), 64)],
        "branch5x5": [((1, 1), 48), ((5, 5), 64)],
        "branch3x3dbl": [((1, 1), 64), ((3, 3), 96), ((3, 3), 96)],
        "branch_pool": [average_pool, ((1, 1), pooled)],
    }


_BLOCK_B = {
    "branch3x3": [((3, 3), 384, 2, "VALID")],
    "branch3x3dbl": [((1, 1), 64), ((3, 3), 96), ((3, 3), 96, 2, "VALID")],
    "maximum": [max_pool_stride_2],
}


def _block_c(n):
    one, row, column = (1, 1), (1, 7), (7, 1)
    return {
        "branch1x1": [(one, 192)],
        "branch7x7": [(one, n), (row, n), (column, 192)],
        "branch7x7dbl": [(one, n), (column, n), (row, n), (column, n), (row, 192)],
        "branch_pool": [average_pool, (one, 192)],
    }


_BLOCK_D = {
    "branch3x3": [((1, 1), 192), ((3, 3), 320, 2, "VALID")],
    "branch7x7x3": [
        ((1, 1), 192),
        ((1, 7), 192),
        ((7, 1), 192),
        ((3, 3), 192, 2, "VALID"),
    ],
    "maximum": [max_pool_stride_2],
}


def _block_e(pool):
    fork = [((1, 3), 384), ((3, 1), 384)]
    return {
        "branch1x1": [((1, 1), 320)],
        "branch3x3": [((1, 1), 384), fork],
        "branch3x3dbl": [((1, 1), 448), ((3, 3), 384), fork],
        "branch_pool": [pool, ((1, 1), 192)],
    }


def _name_layers(name: str, scope: str, steps: list[Any]) -> tuple[Any, ...]:
    """Returns the steps of a branch, its layers as Conv and a fork as a tuple of them.

    PyTorch's names count the layers from 1, TensorFlow's from 0, which it leaves out.
    """
    pools = [step for step in steps if callable(step)]  # these come first
    rows = steps[len(pools) :]
    layers: list[Any] = []
    for i, row in enumerate(rows):
        torch = f"{name}_{i + 1}" if len(rows) > 1 else name
        if isinstance(row, list):
            a, b = row
            first = Conv(f"{torch}a", f"{scope}/mixed/conv", *a)
            layers.append(((first,), (Conv(f"{torch}b", f"{scope}/mixed/conv_1", *b),)))
        else:
            layers.append(Conv(torch, _numbered(f"{scope}/conv", i), *row))
    return (*pools, *layers)


def _name_branches(
    name: str, scope: str, table: dict[str, list[Any]]
) -> tuple[tuple[Any, ...], ...]:
    """Returns the branches of a block; those of several steps have a scope: a tower."""
    branches, towers = [], 0
    for branch, steps in table.items():
        inner = scope
        if len(steps) > 1:
            inner, towers = f"{scope}/{_numbered('tower', towers)}", towers + 1
        branches.append(_name_layers(f"{name}.{branch}", inner, steps))
    return tuple(branches)


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name


STEM = (
    Conv("Conv2d_1a_3x3", "conv", (3, 3), 32, 2, "VALID"),
    Conv("Conv2d_2a_3x3", "conv_1", (3, 3), 32, 1, "VALID"),
    Conv("Conv2d_2b_3x3", "conv_2", (3, 3), 64),
    max_pool_stride_2,
    Conv("Conv2d_3b_1x1", "conv_3", (1, 1), 80),
    Conv("Conv2d_4a_3x3", "conv_4", (3, 3), 192, 1, "VALID"),
    max_pool_stride_2,
)
_TABLES = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _BLOCK_B,
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _BLOCK_D,
    "Mixed_7b": _block_e(average_pool),
    "Mixed_7c": _block_e(max_pool),  # a quirk of the released graph
}
BLOCKS = {
    name: _name_branches(name, _numbered("mixed", i), table)
    for i, (name, table) in enumerate(_TABLES.items())
}


def _list_convs(steps: Iterable[Any]) -> Iterator[Conv]:
    for step in steps:
        if isinstance(step, Conv):
            yield step
        elif isinstance(step, tuple):
            yield from _list_convs(step)


CONVS = tuple(_list_convs((*STEM, *BLOCKS.values())))
_PARAMS = (  # in PyTorch, in TensorFlow, ours, PyTorch's layout
    ("conv.weight", "conv2d_params", "kernel", "oihw->hwio"),
    ("bn.weight", "batchnorm/gamma", "scale", "c->c"),
    ("bn.bias", "batchnorm/beta", "bias", "c->c"),
    ("bn.running_mean", "batchnorm/moving_mean", "mean", "c->c"),
    ("bn.running_var", "batchnorm/moving_variance", "var", "c->c"),
)
# name in the file, path of ours, layout
RULES = tuple(
    (f"{conv.name}.{theirs}", f"{conv.name.replace('.', '/')}/{ours}", layout)
    for conv in CONVS
    for theirs, _, ours, layout in _PARAMS
) + (("fc.weight", "fc/kernel", "oi->io"), ("fc.bias", "fc/bias", "o->o"))
TF_RULES = tuple(
    (
        f"{conv.scope}/{theirs}",
        f"{conv.name.replace('.', '/')}/{ours}",
        layout.replace("oihw", "hwio"),
    )
    for conv in CONVS
    for _, theirs, ours, layout in _PARAMS
) + (("softmax/weights", "fc/kernel", "io->io"), ("softmax/biases", "fc/bias", "o->o"))


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
        for name, branches in BLOCKS.items():
            x = Mixed(branches, name=name)(x)
            if name == "Mixed_6d":  # its first branch is mixed_6/conv
                spatial = x[..., :7].reshape(len(x), SPATIAL)
        pool = x.mean((1, 2))
        logits = Classes(name="fc")(pool)
        return {"pool": pool, "spatial": spatial, "logits": logits}


@cache
def param_shapes() -> Params:
    """Returns the parameters' shapes and types, as a tree."""
    images = jnp.zeros((1, SIDE, SIDE, 3))
    init = lambda: Inception().init(jax.random.key(0), images)
    return jax.eval_shape(init)["params"]


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

    layer: Conv

    @nn.compact
    def __call__(self, x: Float[Array, "b h w _"]) -> Float[Array, "b _ _ d"]:
        layer, width = self.layer, (self.layer.width,)
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        shape = (*layer.kernel, x.shape[-1], layer.width)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        scale, bias = self.param("scale", ones, width), self.param("bias", zeros, width)
        mean, var = self.param("mean", zeros, width), self.param("var", ones, width)
        if layer.kernel == (1, 1):  # a product, which XLA is quicker at on a CPU
            x = x @ kernel[0, 0]
        else:
            strides = (layer.stride, layer.stride)
            axes = ("NHWC", "HWIO", "NHWC")
            x = lax.conv_general_dilated(
                x, kernel, strides, layer.padding, dimension_numbers=axes
            )
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


def _run_steps(steps, x):
    """Runs the steps one after the other, those of a tuple side by side.

    Call it in a compact module.
    """
    for step in steps:
        if isinstance(step, Conv):
            x = ConvUnit(step, name=step.name.rpartition(".")[2])(x)
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
