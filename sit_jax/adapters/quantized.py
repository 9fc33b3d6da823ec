"""Weights in fewer bits, for sampling: which forms there are, and what stays as it is.

w8    int8 weights, one scale an output channel; products in the network's dtype.
w8a8  the same weights; each token is rounded to int8 too, by its largest value as it
      comes, and the products are those of integers with int32 sums.
w4    four bits, a scale for each 128 inputs of an output channel; products in the
      network's dtype. w4gN takes groups of N.

Symmetric round-to-nearest throughout. That this is enough for eight bits and that four
need groups is what Q-DiT (arXiv:2406.17343) and PTQ4DiT (arXiv:2405.16005) found.
"""

import re
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from sit_jax.adapters.stored import Quantized, over, to_int8
from sit_jax.errors import UserError

# Embedders and the last layer hold 0.5 % of XL's weights and all of its first and last
# digits. The modulation is a third of the weights and one product an image: it is w8 in
# every form, for its input is the sum that no token-wise rounding suits.
SKIP = r"(patch|cond|head)/.*"
ONCE_AN_IMAGE = r".*/adaLN/.*"
WORDS = "w8, w8a8, w4 or w4gN"


class Dynamic(Quantized):
    """Quantized, multiplied with activations that are rounded to int8 as well."""

    def product(self, x, dtype):
        x = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        scale = jnp.where(largest > 0, largest, 1) / 127
        codes = jnp.round(x / scale).astype(jnp.int8)
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        out = jax.lax.dot_general(
            codes, self.codes, contract, preferred_element_type=jnp.int32
        )
        return (out * scale * over(self.scale, out)).astype(dtype)


class Grouped(struct.PyTreeNode):
    """codes * scale, a scale for each group of inputs of an output channel.

    Two codes of -7..7 to a byte, 8 added: neighbouring inputs, the first one below.
    """

    TRAINED = ()
    codes: jax.Array  # uint8 [..., groups, size / 2, out]
    scale: jax.Array  # float32 [..., groups, 1, out]

    @property
    def shape(self):
        *lead, groups, half, out = self.codes.shape
        return (*lead, groups * 2 * half, out)

    def read(self):
        low, high = self.codes & 15, self.codes >> 4
        pairs = jnp.stack([low, high], axis=-2).astype(jnp.int8) - 8
        *lead, groups, half, _, out = pairs.shape
        codes = pairs.reshape(*lead, groups, 2 * half, out)
        return (codes * self.scale).reshape(self.shape)

    def product(self, x, dtype):
        return x.astype(dtype) @ self.read().astype(dtype)


def eight(weight, form=Quantized):
    """float [..., in, out] -> form(codes, scale)."""
    return form(*to_int8(weight))


def four(weight, size, path=""):
    """float [..., in, out] -> Grouped, `size` inputs to a group."""
    *lead, inputs, out = weight.shape
    if inputs % size or size % 2:
        raise UserError(
            f"{path} has {inputs} inputs, which do not divide into groups of {size}; "
            f"take w4gN with an even N that divides {inputs}"
        )
    groups = weight.reshape(*lead, inputs // size, size, out)
    largest = jnp.max(jnp.abs(groups), axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest, 1) / 7
    codes = (jnp.round(groups / scale) + 8).astype(jnp.uint8)
    return Grouped(codes[..., ::2, :] | codes[..., 1::2, :] << 4, scale)


def storing(word, skip=SKIP) -> Callable:
    """-> store(path, weight), which gives a matrix the form that the word names.

    What `skip` matches whole, and what is no matrix of a block, stays as it is.
    """
    wide = _form(word)
    try:
        spared = re.compile(skip)
    except re.error as error:
        raise UserError(f"{skip!r} is no regular expression: {error}") from error

    def store(path, weight):
        if spared.fullmatch(path) or not path.endswith("/kernel"):
            return weight
        if re.fullmatch(ONCE_AN_IMAGE, path):
            return eight(weight)
        return wide(weight, path)

    return store


def require_finite(path, weight):
    if not bool(jnp.isfinite(weight).all()):
        raise UserError(f"{path} has values that are not finite: nothing to quantize")


def _form(word):
    if word == "w8":
        return lambda weight, path: eight(weight)
    if word == "w8a8":
        return lambda weight, path: eight(weight, Dynamic)
    if found := re.fullmatch(r"w4(?:g([1-9]\d*))?", str(word)):
        size = int(found[1] or 128)
        return lambda weight, path: partial(four, size=size, path=path)(weight)
    raise UserError(f"{word!r} is no form of weights: {WORDS}")
