"""Where each array lives: one table from names to the mesh axes that split them.

A layer's weights are gathered over `fsdp` when it runs; over `tensor` they stay split,
by heads in attention and by hidden units in the MLP (Shoeybi et al., arXiv:1909.08053).
Optimizer, EMA and gradients follow the weights and are split over `data` too, so that
also replicas hold them once between them (ZeRO-1, arXiv:1910.02054).
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

SMALL = 2**14  # elements; arrays of at most so many are held whole everywhere
TILE = 8  # rows that a TPU keeps and sends together
WEIGHTS = ("fsdp", "tensor")  # axes that may split weights
ZERO1 = ("fsdp", "tensor", "data")  # and optimizer, EMA, gradients

# Name, and the axes of each dimension, the best choice first; the layer axis of stacked
# blocks is left out, and never split, so that the scan gathers one layer at a time.
# The columns of qkv are ordered (q k v, head), which no block of columns is: its heads
# are split after gathering.
_FSDP, _TENSOR, _BOTH = ("fsdp",), ("tensor",), ("fsdp", "tensor")
_BY_ROWS, _BY_COLUMNS = (_BOTH, ()), ((), _BOTH)
_IN, _OUT = (_FSDP, _TENSOR), (_TENSOR, _FSDP)
RULES = (
    (r"attn/qkv/kernel$", (_BY_ROWS, _BY_COLUMNS)),
    (r"mlp/fc1/kernel$", (_IN, _OUT)),
    (r"(attn/proj|mlp/fc2)/kernel$", (_OUT, _IN)),
    (r"(adaLN|skip|time_in|time_out|out)/kernel$", (_BY_ROWS, _BY_COLUMNS)),
    (r"patch/kernel$", (((), (), (), _BOTH),)),
    (r"label/embedding$", (_BY_COLUMNS, _BY_ROWS)),
    (r"positions$", (((), (), _BOTH), ((), _BOTH, ()))),
    (r"attn/position$", (_BY_ROWS,)),
)


class SpecChoice(NamedTuple):
    """How one array is split.

    Attributes:
        spec: mesh axes of each dimension.
        missing: mesh axes that no dimension could be divided by.
    """

    spec: PartitionSpec
    missing: tuple[str, ...]


def weight_shardings(mesh: Mesh, params: Any) -> Any:
    """Returns the shardings of weights (arrays or shapes), leaf by leaf."""
    return _shardings(mesh, params, WEIGHTS)


def zero1_shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns the shardings of what follows weights: optimizer, EMA, gradients."""
    return _shardings(mesh, tree, ZERO1)


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Returns the shardings of a TrainState."""
    return zero1_shardings(mesh, state).replace(
        params=weight_shardings(mesh, state.params),
        frozen_params=weight_shardings(mesh, state.frozen_params),
    )


def shard_gradients(mesh: Mesh) -> Callable[[Any], Any]:
    """Returns a function for jit that constrains gradients as zero1_shardings."""
    return lambda grads: jax.lax.with_sharding_constraint(
        grads, zero1_shardings(mesh, grads)
    )


def unsharded_arrays(
    mesh: Mesh | AbstractMesh, tree: Any
) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Returns name, shape and mesh axes of the arrays that these axes cannot split."""
    arrays = array_shapes(tree)
    missing = [choose_spec(*array, mesh.shape, ZERO1).missing for array in arrays]
    return [(*array, axes) for array, axes in zip(arrays, missing, strict=True) if axes]


def array_shapes(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Returns name and shape of all arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(_name(path), leaf.shape) for path, leaf in leaves]


def partial_tile_rows(
    name: str, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> int | None:
    """Returns the rows of a device where those of a weight are no whole tiles.

    A TPU cannot gather such pieces as they lie: it pads them with zeros to whole
    weights and adds these up, which sends about twice as much (docs/evidence/tpu.md).
    """
    spec = choose_spec(name, shape, sizes, ("fsdp",)).spec
    split = (dim for dim, axis in zip(shape, spec, strict=False) if axis == "fsdp")
    pieces = (dim // sizes["fsdp"] for dim in split)
    return next((rows for rows in pieces if rows % TILE), None)


def choose_spec(
    name: str,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    axes: tuple[str, ...],
) -> SpecChoice:
    """Returns how an array is split.

    Of the rules for the name, the first that divides counts. An array that is not in
    the table, or whose rules it does not fit, is split along its longest dimension that
    divides. An axis that then divides nothing is in `missing`.

    Args:
        name: path of the array, a/b/c.
        shape: of the array.
        sizes: of the mesh axes by name.
        axes: that may split the array.
    """
    axes = tuple(axis for axis in axes if sizes[axis] > 1)
    if math.prod(shape) <= SMALL:
        return SpecChoice(PartitionSpec(), ())
    first = 1 if "blocks" in name and len(shape) > 1 else 0
    dims = shape[first:]
    fits = lambda rule: None not in _pieces(dims, rule, sizes)
    rules = filter(fits, _rules_for(name, len(dims), axes))
    rule = next(rules, [()] * len(dims))
    missing = ()
    for axis in axes:
        if axis not in sum(rule, ()):
            rule, left = _add_axis(dims, rule, axis, sizes)
            missing += left
    spec = [names[0] if len(names) == 1 else names or None for names in rule]
    return SpecChoice(PartitionSpec(*[None] * first, *spec), missing)


def _shardings(mesh, tree, axes):
    def sharding(path, leaf):
        choice = choose_spec(_name(path), leaf.shape, mesh.shape, axes)
        return NamedSharding(mesh, choice.spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _rules_for(name, ndim, axes):
    """Returns the rules for a name, each a tuple of usable axes for each dimension."""
    name = re.sub(r"(/base|/codes)+$", "", name)  # of a weight in a stored form
    rules = next((rules for pattern, rules in RULES if re.search(pattern, name)), ())
    keep = lambda names: tuple(axis for axis in names if axis in axes)
    return [list(map(keep, rule)) for rule in rules if len(rule) == ndim]


def _pieces(dims, rule, sizes):
    """Returns the length of a piece of each dimension, None where it is not whole."""
    counts = [math.prod(sizes[axis] for axis in axes) for axes in rule]
    pairs = zip(dims, counts, strict=True)
    return [None if dim % count else dim // count for dim, count in pairs]


def _add_axis(dims, rule, axis, sizes):
    """Returns the rule with one axis more, where the longest piece divides."""
    pieces = _pieces(dims, rule, sizes)
    for i in sorted(range(len(dims)), key=lambda i: -pieces[i]):
        if pieces[i] % sizes[axis] == 0:
            return [*rule[:i], (*rule[i], axis), *rule[i + 1 :]], ()
    return rule, (axis,)
