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
_IN, _OUT = ("fsdp", "tensor"), ("tensor", "fsdp")
_WHOLE_IN, _WHOLE_OUT = (_IN, None), (None, _IN)
RULES = (
    (r"attn/qkv/kernel$", (_WHOLE_IN, _WHOLE_OUT)),
    (r"mlp/fc1/kernel$", (_IN, _OUT)),
    (r"(attn/proj|mlp/fc2)/kernel$", (_OUT, _IN)),
    (r"(adaLN|skip|time_in|time_out|out)/kernel$", (_WHOLE_IN, _WHOLE_OUT)),
    (r"patch/kernel$", ((None, None, None, _IN),)),
    (r"label/embedding$", (_WHOLE_OUT, _WHOLE_IN)),
    (r"positions$", ((None, None, _IN), (None, _IN, None))),
    (r"attn/position$", (_WHOLE_IN,)),
)


class SpecChoice(NamedTuple):
    """How one array is split.

    Attributes:
        spec: mesh axes of each dimension.
        missing: mesh axes that no dimension could be divided by.
    """

    spec: PartitionSpec
    missing: tuple[str, ...]


def weight_shardings(mesh: Mesh, params: Any, small: int = SMALL) -> Any:
    """Returns the shardings of weights (arrays or shapes), leaf by leaf."""
    return _shardings(mesh, params, WEIGHTS, small)


def zero1_shardings(mesh: Mesh, tree: Any, small: int = SMALL) -> Any:
    """Returns the shardings of what follows weights: optimizer, EMA, gradients."""
    return _shardings(mesh, tree, ZERO1, small)


def state_shardings(mesh: Mesh, state: Any, small: int = SMALL) -> Any:
    """Returns the shardings of a TrainState."""
    return zero1_shardings(mesh, state, small).replace(
        params=weight_shardings(mesh, state.params, small),
        frozen_params=weight_shardings(mesh, state.frozen_params, small),
    )


def shard_gradients(mesh: Mesh, small: int = SMALL) -> Callable[[Any], Any]:
    """Returns a function for jit that constrains gradients as zero1_shardings."""

    def constrain(grads):
        shardings = zero1_shardings(mesh, grads, small)
        return jax.tree.map(jax.lax.with_sharding_constraint, grads, shardings)

    return constrain


def unsharded_arrays(
    mesh: Mesh | AbstractMesh, tree: Any, small: int = SMALL
) -> list[tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Returns name, shape and mesh axes of the arrays that these axes cannot split."""
    choices = [
        (name, shape, choose_spec(name, shape, mesh.shape, ZERO1, small).missing)
        for name, shape in array_shapes(tree)
    ]
    return [choice for choice in choices if choice[2]]


def array_shapes(tree: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Returns name and shape of all arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(_name(path), leaf.shape) for path, leaf in leaves]


def partial_tile_rows(
    name: str, shape: tuple[int, ...], sizes: Mapping[str, int]
) -> int | None:
    """Returns the rows of a device where those of a weight are no whole tiles.

    A TPU cannot gather such pieces as they lie: it pads them with zeros to whole
    weights and adds these up, which sends about twice as much (docs/tpu.md).
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
    small: int = SMALL,
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
        small: number of elements up to which it is held whole.
    """
    axes = tuple(axis for axis in axes if sizes[axis] > 1)
    if math.prod(shape) <= small:
        return SpecChoice(PartitionSpec(), ())
    first = 1 if "blocks" in name and len(shape) > 1 else 0
    dims, rules = shape[first:], _rules_for(name, len(shape) - first)
    rules = [_keep_axes(rule, axes) for rule in rules]
    rule = next((rule for rule in rules if _fits(dims, rule, sizes)), [()] * len(dims))
    missing = ()
    for axis in axes:
        if not any(axis in names for names in rule):
            rule, left = _add_axis(dims, rule, axis, sizes)
            missing += left
    spec = [names[0] if len(names) == 1 else names or None for names in rule]
    return SpecChoice(PartitionSpec(*[None] * first, *spec), missing)


def _shardings(mesh, tree, axes, small):
    def sharding(path, leaf):
        choice = choose_spec(_name(path), leaf.shape, mesh.shape, axes, small)
        return NamedSharding(mesh, choice.spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _rules_for(name, ndim):
    name = re.sub(r"(/base|/codes)+$", "", name)  # of a weight in a stored form
    for pattern, rules in RULES:
        if re.search(pattern, name):
            return [rule for rule in rules if len(rule) == ndim]
    return []


def _keep_axes(rule, axes):
    """Returns a tuple of axes for each dimension, only those that may be used."""
    as_tuple = lambda names: (names,) if isinstance(names, str) else names or ()
    return [tuple(name for name in as_tuple(names) if name in axes) for names in rule]


def _fits(dims, rule, sizes):
    parts = (math.prod(sizes[name] for name in names) for names in rule)
    return all(dim % n == 0 for dim, n in zip(dims, parts, strict=True))


def _add_axis(dims, rule, axis, sizes):
    """Returns the rule with one axis more, where the longest piece divides."""
    pieces = [
        dim // math.prod(sizes[name] for name in names)
        for dim, names in zip(dims, rule, strict=True)
    ]
    for i in sorted(range(len(dims)), key=lambda i: -pieces[i]):
        if pieces[i] % sizes[axis] == 0:
            return [*rule[:i], (*rule[i], axis), *rule[i + 1 :]], ()
    return rule, (axis,)
