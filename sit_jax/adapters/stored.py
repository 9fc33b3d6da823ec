"""Weights stored in another form: quantized, adapted (LoRA, DoRA), grown by rows.

Such a weight stands in the tree of parameters where the plain array would. It can be
read, which gives the array, and multiplied with, which need not: models.applied does
so layer by layer. `split` sets apart what is trained, so that gradients, optimizer,
average and checkpoint never see the rest. Stacked weights need nothing special: `@`
and the axes -1 and -2 ignore leading ones.
"""

import difflib
import re
import zlib
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from sit_jax.errors import UserError
from sit_jax.models.products import product as multiply


class Quantized(struct.PyTreeNode):
    """codes * scale, with one scale an output channel."""

    TRAINED: ClassVar = ()
    codes: jax.Array  # int8 [..., in, out]
    scale: jax.Array  # float32 [..., 1, out]

    @property
    def shape(self):
        return self.codes.shape

    def read(self):
        return self.codes * self.scale

    def product(self, x, dtype):
        """x [..., in] -> [..., out] of one layer, computed in dtype."""
        out = x.astype(dtype) @ self.codes.astype(dtype)
        # float32: rounding the scale would move a whole channel to one side
        return (out * over(self.scale, out)).astype(dtype)


class Adapted(struct.PyTreeNode):
    """base + scale * down @ up (LoRA, arXiv:2106.09685), of which base is not trained.

    With a magnitude, DoRA (arXiv:2402.09353): each output channel of that sum is
    brought to the length `magnitude`, and the gradient takes its own for constant.
    keys: one a layer and row of the batch; without them nothing is dropped.
    """

    TRAINED: ClassVar = ("down", "up", "magnitude")
    base: jax.Array | struct.PyTreeNode  # [..., in, out]
    down: jax.Array  # [..., in, rank]
    up: jax.Array  # [..., rank, out]
    magnitude: jax.Array | None = None  # [..., out]
    keys: jax.Array | None = None  # [..., B]
    scale: float = struct.field(pytree_node=False, default=1.0)
    dropout: float = struct.field(pytree_node=False, default=0.0)  # of its input

    @property
    def shape(self):
        return self.base.shape

    def read(self):
        with jax.default_matmul_precision("highest"):  # for good, whatever the device
            whole = read(self.base) + self.scale * (self.down @ self.up)
            if self.magnitude is None:
                return whole
            return whole * self._gain()[..., None, :]

    def product(self, x, dtype):
        out, dropped = product(x, self.base, dtype), self._dropped(x)
        down, up = self.down.astype(dtype), self.up.astype(dtype)
        more = multiply(multiply(dropped.astype(dtype), down), self.scale * up)
        if self.magnitude is None:
            return out + more
        gain = over(self._gain().astype(dtype), out)
        if self.keys is None:
            return gain * (out + more)
        # PEFT: all that training adds to the base's output sees the dropped input
        return out + (gain - 1) * product(dropped, self.base, dtype) + gain * more

    def rows(self, index):
        """Rows of a table that is not stacked: index int [B] -> [B, out]."""
        return rows(self.base, index) + self.down[index] @ (self.scale * self.up)

    def _gain(self):
        whole = read(self.base) + self.scale * (self.down @ self.up)
        length = jnp.sqrt(jnp.sum(whole**2, axis=-2))
        return self.magnitude / jax.lax.stop_gradient(length)

    def _dropped(self, x):
        if self.keys is None:
            return x
        keep = 1 - self.dropout
        kept = jax.vmap(lambda key, row: jax.random.bernoulli(key, keep, row.shape))
        return jnp.where(kept(self.keys, x), x / keep, 0)


class Grown(struct.PyTreeNode):
    """A table with further rows before its last, which stays the null label's."""

    TRAINED: ClassVar = ("more",)
    base: jax.Array | struct.PyTreeNode  # [K, D]
    more: jax.Array  # [N, D]

    @property
    def shape(self):
        return (len(self.more) + self.base.shape[0], self.base.shape[1])

    def read(self):
        base = read(self.base)
        return jnp.concatenate([base[:-1], self.more, base[-1:]])

    def rows(self, index):
        return self.read()[index]


def over(vector, x):
    """vector [out] with as many axes as x [..., out]."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def is_stored(node):
    """Whether it is one of these forms, or one of quantized.py: no array has .read."""
    return hasattr(type(node), "read") and hasattr(type(node), "shape")


def read(tree):
    """The same tree, or leaf, in plain arrays."""
    plain = lambda node: node.read() if is_stored(node) else node
    return jax.tree.map(plain, tree, is_leaf=is_stored)


def merged(tree):
    """Adapters and new rows read into their base where that is an array, not int8."""

    def one(node):
        below = node
        while isinstance(below, Adapted | Grown):
            below = below.base
        return node if is_stored(below) else read(node)

    return jax.tree.map(one, tree, is_leaf=is_stored)


def product(x, weight, dtype):
    """x [..., in] times one layer's weight, of any form -> [..., out]."""
    if is_stored(weight):
        return weight.product(x, dtype)
    return x.astype(dtype) @ weight.astype(dtype)


def rows(table, index):
    """Rows of a table of any form: index int [B] -> [B, D]."""
    return table.rows(index) if hasattr(table, "rows") else read(table)[index]


def split(tree):
    """-> what is trained, and what is frozen: two trees, for join to put together.

    Without adapters or new rows everything is trained, and the second tree is empty.
    """
    nodes = jax.tree.leaves(tree, is_leaf=is_stored)
    if not any(getattr(node, "TRAINED", ()) for node in nodes):
        return tree, {}
    return _part(tree, True), _part(tree, False)


def join(trained, frozen):
    """The tree that was split."""
    if trained is None or frozen is None or frozen == {}:
        return frozen if trained is None else trained
    if is_stored(trained):
        return trained.replace(base=join(trained.base, frozen.base))
    names = [*trained, *(name for name in frozen if name not in trained)]
    return {name: join(trained.get(name), frozen.get(name)) for name in names}


def dropping(tree, keys):
    """keys [B], one a row of the batch -> the tree, its dropouts drawn from them."""

    def one(path, node):
        if not getattr(node, "dropout", 0):
            return node
        name = jax.tree_util.keystr(path).encode()
        own = jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(name)))(keys)
        layers = lambda key: jax.random.split(key, node.down.shape[:-2])
        return node.replace(keys=jax.vmap(layers, out_axes=-1)(own))

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_stored)


def replace(tree, pattern, store):
    """Stores the matrices whose path matches pattern, as store(path, weight) says.

    A pattern that matches none is refused, with the paths that are nearest to it.
    """
    flat = flatten_dict(tree, sep="/")
    found = matched(pattern, flat)
    new = {path: store(path, w) if path in found else w for path, w in flat.items()}
    return unflatten_dict(new, sep="/")


def matched(pattern, paths):
    """-> those paths of matrices that the regular expression matches whole."""
    try:
        regex = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{pattern!r} is no regular expression: {error}") from error
    able = [path for path in paths if is_matrix(path)]
    if found := [path for path in able if regex.fullmatch(path)]:
        return found
    plain = re.sub(r"[^\w/]+", "", pattern)
    near = difflib.get_close_matches(plain, able, 3, 0) or able[:3]
    raise UserError(f"{pattern!r} matches no weight; nearest: {', '.join(near)}")


def is_matrix(path):
    """Whether a parameter multiplies a vector of features, or is the label table.

    The kernel of the patches is a convolution's, and the others are added.
    """
    *_, layer, name = ("", *path.split("/"))
    return name == "embedding" or (name == "kernel" and layer != "patch")


def quantize(path, weight):
    """float [..., in, out] -> Quantized to int8, symmetric, the largest as 127."""
    if not bool(jnp.isfinite(weight).all()):
        raise UserError(f"{path} has values that are not finite: nothing to quantize")
    return Quantized(*to_int8(weight))


def to_int8(weight):
    """float [..., in, out] -> codes, and the scale of each output channel."""
    largest = jnp.max(jnp.abs(weight), axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1) / 127
    return jnp.round(weight / scale).astype(jnp.int8), scale


def _part(node, trained):
    """The half of a tree that is trained, or the other; None if there is none."""
    if isinstance(node, dict):
        parts = {name: _part(child, trained) for name, child in node.items()}
        return {n: part for n, part in parts.items() if part is not None} or None
    own = getattr(node, "TRAINED", ())
    if not own:
        return None if trained else node
    fields = {name: getattr(node, name) if trained else None for name in own}
    return node.replace(base=_part(node.base, trained), **fields)
