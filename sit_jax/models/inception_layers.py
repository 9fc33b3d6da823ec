"""The layers of the 2015 Inception network as a table, and the porting rules it gives.

Each row has the layer's name in PyTorch (torch-fidelity's and pytorch-fid's state dict)
and its scope in the TensorFlow graph classify_image_graph_def.pb.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

POOL, CLASSES = 2048, 1008  # features of an image, outputs


class Conv(NamedTuple):
    """Convolution without bias, batch norm, ReLU."""

    name: str
    scope: str
    width: int
    kernel: tuple
    stride: int = 1
    padding: str = "SAME"


def average(x):
    """Means of 3 x 3 pixels, [B, H, W, C]; what lies outside does not count."""
    counts = _windows(_framed(np.ones((1, *x.shape[1:3], 1), x.dtype), 0), jnp.add)
    return _windows(_framed(x, 0), jnp.add) / counts


def largest(x):
    """Maxima of 3 x 3 pixels, [B, H, W, C]."""
    return _windows(_framed(x, -jnp.inf), jnp.maximum)


def halved(x):
    """Maxima of 3 x 3 pixels at every second place, where they lie inside."""
    return _windows(x, jnp.maximum, 2)


def _framed(x, value):
    frame = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jnp.pad(x, frame, constant_values=value)


def _windows(x, combine, stride=1):
    """combine over 3 x 3 pixels, by shifted copies.

    XLA's reduce_window takes 2 to 6 times as long on a CPU.
    """
    for axis in (1, 2):
        span = (x.shape[axis] - 3) // stride * stride + 1
        a, b, c = (
            lax.slice_in_dim(x, first, first + span, stride, axis) for first in range(3)
        )
        x = combine(combine(a, b), c)
    return x


def _a(pooled):
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
        [average, Conv("branch_pool", "tower_2/conv", pooled, (1, 1))],
    )


_B = (
    [Conv("branch3x3", "conv", 384, (3, 3), 2, "VALID")],
    [
        Conv("branch3x3dbl_1", "tower/conv", 64, (1, 1)),
        Conv("branch3x3dbl_2", "tower/conv_1", 96, (3, 3)),
        Conv("branch3x3dbl_3", "tower/conv_2", 96, (3, 3), 2, "VALID"),
    ],
    [halved],
)


def _c(width):
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
        [average, Conv("branch_pool", "tower_2/conv", 192, (1, 1))],
    )


_D = (
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
    [halved],
)


def _e(pool):
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
    halved,
    Conv("Conv2d_3b_1x1", "conv_3", 80, (1, 1)),
    Conv("Conv2d_4a_3x3", "conv_4", 192, (3, 3), 1, "VALID"),
    halved,
)
BLOCKS = (  # name, scope, branches: each a list of steps, a tuple among them a fork
    ("Mixed_5b", "mixed", _a(32)),
    ("Mixed_5c", "mixed_1", _a(64)),
    ("Mixed_5d", "mixed_2", _a(64)),
    ("Mixed_6a", "mixed_3", _B),
    ("Mixed_6b", "mixed_4", _c(128)),
    ("Mixed_6c", "mixed_5", _c(160)),
    ("Mixed_6d", "mixed_6", _c(160)),
    ("Mixed_6e", "mixed_7", _c(192)),
    ("Mixed_7a", "mixed_8", _D),
    ("Mixed_7b", "mixed_9", _e(average)),
    ("Mixed_7c", "mixed_10", _e(largest)),  # a quirk of the released graph
)

_PARTS = (  # in PyTorch, its layout, in TensorFlow, its layout, ours
    ("conv.weight", "oihw->hwio", "conv2d_params", "hwio->hwio", "kernel"),
    ("bn.weight", "c->c", "batchnorm/gamma", "c->c", "scale"),
    ("bn.bias", "c->c", "batchnorm/beta", "c->c", "bias"),
    ("bn.running_mean", "c->c", "batchnorm/moving_mean", "c->c", "mean"),
    ("bn.running_var", "c->c", "batchnorm/moving_variance", "c->c", "var"),
)


def _places(steps, width, torch="", scope="", flax=""):
    """Yields (torch name, TensorFlow scope, flax path, shape of the kernel) of each
    convolution, in the order of torch's state dict; -> channels after the last one.

    width: channels before the first one; torch, scope, flax: what names begin with.
    """
    for step in steps:
        if isinstance(step, Conv):
            shape = (*step.kernel, width, step.width)
            yield torch + step.name, scope + step.scope, flax + step.name, shape
            width = step.width
        elif isinstance(step, tuple):
            widths = []
            for branch in step:
                found = yield from _places(branch, width, torch, scope, flax)
                widths.append(found)
            width = sum(widths)
    return width


def _all_places():
    width = yield from _places(STEM, 3)
    for name, scope, branches in BLOCKS:
        starts = (f"{name}.", f"{scope}/", f"{name}/")
        width = yield from _places([branches], width, *starts)


PLACES = tuple(_all_places())
RULES = tuple(
    (f"{torch}.{theirs}", f"{flax}/{ours}", layout)
    for torch, _, flax, _ in PLACES
    for theirs, layout, _, _, ours in _PARTS
) + (("fc.weight", "fc/kernel", "oi->io"), ("fc.bias", "fc/bias", "o->o"))

TF_RULES = tuple(
    (f"{scope}/{theirs}", f"{flax}/{ours}", layout)
    for _, scope, flax, _ in PLACES
    for _, _, theirs, layout, ours in _PARTS
) + (("softmax/weights", "fc/kernel", "io->io"), ("softmax/biases", "fc/bias", "o->o"))

SHAPES = (
    {  # of all parameters, by flax path
        f"{flax}/{ours}": shape if ours == "kernel" else shape[-1:]
        for _, _, flax, shape in PLACES
        for *_, ours in _PARTS
    }
    | {"fc/kernel": (POOL, CLASSES), "fc/bias": (CLASSES,)}
)
