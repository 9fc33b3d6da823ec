"""Where each weight lives: one table from names to the mesh axes that split them.

A layer's weights are gathered over `fsdp` when it runs; over `tensor` they stay split,
by heads in attention and by hidden units in the MLP (Shoeybi et al., arXiv:1909.08053).
Optimizer, moving averages and gradients follow the weights and are split over `data`
too, so that also replicas hold them once between them (ZeRO-1, arXiv:1910.02054).
"""

import math
import re
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

SMALL = 2**14  # elements; arrays of at most so many are held whole everywhere
TILE = 8  # rows that a TPU keeps and sends together

# Name, and the axes of each dimension, the best choice first; the layer axis of stacked
# blocks is left out, and never split, so that the scan gathers one layer at a time.
# The columns of qkv are ordered (q k v, head), which no block of columns is: its heads
# are split after gathering.
_IN, _OUT = ("fsdp", "tensor"), ("tensor", "fsdp")
_WHOLE_IN, _WHOLE_OUT = (_IN, None), (None, _IN)
TABLE = (
    (r"attn/qkv/kernel$", (_WHOLE_IN, _WHOLE_OUT)),
    (r"mlp/fc1/kernel$", (_IN, _OUT)),
    (r"(attn/proj|mlp/fc2)/kernel$", (_OUT, _IN)),
    (r"(adaLN|skip|time_in|time_out|out)/kernel$", (_WHOLE_IN, _WHOLE_OUT)),
    (r"patch/kernel$", ((None, None, None, _IN),)),
    (r"label/embedding$", (_WHOLE_OUT, _WHOLE_IN)),
    (r"positions$", ((None, None, _IN), (None, _IN, None))),
    (r"attn/position$", (_WHOLE_IN,)),
)


class Place(NamedTuple):
    """Of one array: the axes of each dimension, and those that should split it."""

    spec: PartitionSpec
    missing: tuple  # mesh axes that no dimension could be divided by


def weights(mesh, params, small=SMALL):
    """-> the shardings of weights (arrays or shapes), leaf by leaf."""
    return _placed(mesh, params, ("fsdp", "tensor"), small)


def once(mesh, tree, small=SMALL):
    """-> those of what follows the weights: optimizer, averages, gradients."""
    return _placed(mesh, tree, ("fsdp", "tensor", "data"), small)


def of_state(mesh, state, small=SMALL):
    """-> those of a TrainState."""
    held = {name: getattr(state, name) for name in ("params", "frozen")}
    held = {name: weights(mesh, tree, small) for name, tree in held.items()}
    return once(mesh, state, small).replace(**held)


def gathered(mesh, small=SMALL):
    """-> gradients -> gradients, stated to live where the optimizer does; in jit."""

    def keep(grads):
        where = once(mesh, grads, small)
        return jax.tree.map(jax.lax.with_sharding_constraint, grads, where)

    return keep


def undivided(mesh, tree, small=SMALL):
    """-> [(name, shape, mesh axes)] of the arrays that these axes could not split."""
    found, axes = named(tree), ("fsdp", "tensor", "data")
    missing = [place(name, shape, mesh.shape, axes, small) for name, shape in found]
    pairs = zip(found, missing, strict=True)
    return [(*each, where.missing) for each, where in pairs if where.missing]


def named(tree):
    """-> [(name, shape)] of all arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(_name(path), leaf.shape) for path, leaf in leaves]


def ragged(name, shape, sizes):
    """-> the rows of a device where those of a weight are no whole tiles, or None.

    A TPU cannot gather such pieces as they lie: it pads them with zeros to whole
    weights and adds these up, which sends about twice as much (docs/tpu.md).
    """
    spec = place(name, shape, sizes, ("fsdp",)).spec
    split = (dim for dim, axis in zip(shape, spec, strict=False) if axis == "fsdp")
    pieces = (dim // sizes["fsdp"] for dim in split)
    return next((rows for rows in pieces if rows % TILE), None)


def place(name, shape, sizes, axes, small=SMALL):
    """-> Place. name: a/b/c; sizes: {mesh axis: size}; axes: those that may split it.

    Of the table's choices for the name, the first that divides counts. An array that is
    not in the table, or whose table it does not fit, is split along its longest
    dimension that divides. An axis that then divides nothing is in `missing`.
    """
    axes = tuple(axis for axis in axes if sizes[axis] > 1)
    if math.prod(shape) <= small:
        return Place(PartitionSpec(), ())
    first = 1 if "blocks" in name and len(shape) > 1 else 0
    dims, rows = shape[first:], _rows(name, len(shape) - first)
    chosen = [_kept(row, axes) for row in rows]
    fit = [row for row in chosen if _divides(dims, row, sizes)]
    row, missing = (fit[0] if fit else [()] * len(dims)), ()
    for axis in axes:
        if not any(axis in names for names in row):
            row, left = _added(dims, row, axis, sizes)
            missing += left
    spec = [names[0] if len(names) == 1 else names or None for names in row]
    return Place(PartitionSpec(*[None] * first, *spec), missing)


def _placed(mesh, tree, axes, small):
    def where(path, leaf):
        found = place(_name(path), leaf.shape, mesh.shape, axes, small)
        return NamedSharding(mesh, found.spec)

    return jax.tree_util.tree_map_with_path(where, tree)


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _rows(name, ndim):
    name = re.sub(r"(/base|/codes)+$", "", name)  # of a weight in a stored form
    for pattern, rows in TABLE:
        if re.search(pattern, name):
            return [row for row in rows if len(row) == ndim]
    return []


def _kept(row, axes):
    """Of a row of the table, only the axes that may be used: a tuple a dimension."""
    as_tuple = lambda names: (names,) if isinstance(names, str) else names or ()
    return [tuple(name for name in as_tuple(names) if name in axes) for names in row]


def _divides(dims, row, sizes):
    parts = (math.prod(sizes[name] for name in names) for names in row)
    return all(dim % n == 0 for dim, n in zip(dims, parts, strict=True))


def _added(dims, row, axis, sizes):
    """The row with one axis more, where the longest piece divides; and what is left."""
    pieces = [
        dim // math.prod(sizes[name] for name in names)
        for dim, names in zip(dims, row, strict=True)
    ]
    for i in sorted(range(len(dims)), key=lambda i: -pieces[i]):
        if pieces[i] % sizes[axis] == 0:
            return [*row[:i], (*row[i], axis), *row[i + 1 :]], ()
    return row, (axis,)
