"""Weights in fewer bits, for sampling: the forms, and trees and checkpoints of them.

w8    int8 weights, one scale an output channel; products in the network's dtype.
w8a8  the same weights; each token is rounded to int8 too, by its largest value as it
      comes, and the products are those of integers with int32 sums.
w4    four bits, a scale for each 128 inputs of an output channel; products in the
      network's dtype. w4gN takes groups of N.

Rounding is symmetric, to the nearest. That this is enough for eight bits and that four
need groups is what Q-DiT (arXiv:2406.17343) and PTQ4DiT (arXiv:2405.16005) found.

A quantized step is the item "ema" with codes and scales in place of matrices; its meta
says in which form ("quantized": {"form", "skip"}).
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sit_jax.adapters.weights import (
    Int4Weight,
    Int8ActivationWeight,
    Int8Weight,
    full_matches,
    is_weight_leaf,
    require_finite,
)
from sit_jax.errors import UserError

# Embedders and the last layer hold 0.5 % of XL's weights and all of its first and last
# digits. The modulation is a third of the weights and one product an image: it is w8 in
# every form, since its input is a sum that no token-wise rounding suits.
SKIP = r"(patch|cond|head)/.*"
MODULATION = r".*/adaLN/.*"
FORMS = "w8, w8a8, w4 or w4gN"
EIGHT_BITS = {"w8": Int8Weight, "w8a8": Int8ActivationWeight}

Quantizer = Callable[[str, Any], Any]  # (path, weight) -> the weight in its form


def make_quantizer(form: str, skip: str = SKIP) -> Quantizer:
    """Returns a function that gives a matrix the form that a word names.

    Args:
      form: one of FORMS.
      skip: regular expression; what it matches whole stays as it is, like everything
        that is no matrix of a block.

    Raises:
      UserError: there is no such form, or `skip` is no regular expression.
    """
    groups = re.fullmatch(r"w4(?:g([1-9]\d{0,8}))?", str(form))
    if form not in EIGHT_BITS and not groups:
        raise UserError(f"{form!r} is no form of weights: {FORMS}")
    list(full_matches(skip, ["a/path"]))  # refuses what is no regular expression

    def quantize(path, weight):
        if not path.endswith("/kernel") or [*full_matches(skip, [path])]:
            return weight
        if re.fullmatch(MODULATION, path):
            return Int8Weight.from_float(weight)
        if groups:
            return Int4Weight.from_float(weight, int(groups[1] or 128), path)
        return EIGHT_BITS[form].from_float(weight)

    return quantize


def quantize_params(params: dict, form: str, skip: str = SKIP) -> dict:
    """Returns parameters with their matrices in the form that a word names.

    Raises:
      UserError: they are quantized already, are not finite, or `skip` spares all.
    """
    quantize = make_quantizer(form, skip)
    flat = flatten_dict(params, sep="/")
    for path, leaf in flat.items():
        if is_weight_leaf(leaf):
            raise UserError(f"{path} is in another form already, not floats: no {form}")
        require_finite(path, leaf)
    new = {path: quantize(path, leaf) for path, leaf in flat.items()}
    return _nest(new, form, skip)


def quantized_shapes(shapes: dict, meta: dict) -> dict:
    """Returns the shapes that a step with this meta holds, from those of floats."""
    form = meta.get("quantized")
    if form is None:
        return shapes
    quantize = make_quantizer(form["form"], form["skip"])
    flat = {
        path: jax.eval_shape(partial(quantize, path), leaf)
        for path, leaf in flatten_dict(shapes, sep="/").items()
    }
    return unflatten_dict(flat, sep="/")


def quantize_stream(
    leaves: Iterable[tuple[str, np.ndarray]],
    form: str,
    skip: str = SKIP,
    total: int | None = None,
) -> tuple[dict, list[tuple[str, int, int, float]]]:
    """Quantizes (path, float array) one after the other, layer by layer.

    Only one float leaf is held at a time, and no second one of its size is made.

    Returns:
      the tree, and for each leaf its path, bytes before and after, and the relative L2
      error of the weights (0 of those that stay).
    """
    from tqdm import tqdm

    quantize, flat, rows = make_quantizer(form, skip), {}, []
    for path, leaf in tqdm(leaves, total=total, unit="weight", disable=None):
        flat[path], error = _quantize_layers(quantize, path, leaf)
        rows.append((path, leaf.nbytes, tree_bytes(flat[path]), error))
    return _nest(flat, form, skip), sorted(rows)


def tree_bytes(tree: Any) -> int:
    """Returns the bytes of all arrays in a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _quantize_layers(quantize, path, leaf):
    """Quantizes a stack a layer at a time; returns it and its relative L2 error."""
    layers, difference, norm = [], 0.0, 0.0
    for weight in leaf if leaf.ndim > 2 else [leaf]:
        require_finite(path, weight)
        new = quantize(path, jnp.asarray(weight))
        if is_weight_leaf(new):
            exact = np.asarray(weight, np.float64)
            difference += np.sum((np.asarray(new.read(), np.float64) - exact) ** 2)
            norm += np.sum(exact**2)
        layers.append(jax.tree.map(np.asarray, new))
    error = float((difference / norm) ** 0.5) if norm else 0.0
    if leaf.ndim <= 2:
        return layers[0], error
    return jax.tree.map(lambda *arrays: np.stack(arrays), *layers), error


def _nest(flat, form, skip):
    if not any(map(is_weight_leaf, flat.values())):
        raise UserError(f"{skip!r} spares every weight: nothing becomes {form}")
    return unflatten_dict(flat, sep="/")
