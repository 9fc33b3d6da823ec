"""Parameters that are not plain arrays: LoRA and DoRA, 8 and 4 bits, added rows.

Such a `WeightLeaf` stands in the tree of parameters where the plain array would. It can
be read, which gives the array, and multiplied with, which need not (apply.py does so
layer by layer). `split_trainable` sets apart what is trained, so that gradients,
optimizer, EMA and checkpoint never see the rest. Weights stacked over layers need
nothing special: `@` and the axes -1 and -2 ignore leading ones.
"""

import abc
import dataclasses
import difflib
import time
import zlib
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self, dataclass_transform

import jax
import jax.numpy as jnp
import regex
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Int, Int8, Key, UInt8

from sit_jax.errors import UserError
from sit_jax.models.attention_cpu import training_product

LABEL_TABLE = "cond/label/embedding"
PATTERN_SECONDS = 2.0  # for all matches of one pattern; a sane one takes microseconds


class WeightLeaf(abc.ABC):
    """What may stand in the place of a weight [..., in, out].

    TRAINABLE: fields that are trained. STATIC: fields that are no arrays. STORED_NAMES:
    names of fields in checkpoints, where they differ.
    """

    TRAINABLE: ClassVar[tuple[str, ...]] = ()
    STATIC: ClassVar[tuple[str, ...]] = ()
    STORED_NAMES: ClassVar[dict[str, str]] = {}

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that the leaf stands for."""

    @abc.abstractmethod
    def read(self) -> Float[Array, "..."]:
        """Returns the plain array."""

    def product(self, x: Float[Array, "... i"], dtype: Any) -> Float[Array, "... o"]:
        """Returns x times the weight of one layer, computed in dtype."""
        return x.astype(dtype) @ self.read().astype(dtype)

    def rows(self, index: Int[Array, " b"]) -> Float[Array, "b o"]:
        """Returns rows of a table that is not stacked."""
        return self.read()[index]

    def replace(self, **fields: Any) -> Self:
        """Returns a copy with other fields."""
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]


@dataclass_transform(frozen_default=True)
def _pytree(cls):
    """Makes a frozen dataclass and a pytree of a WeightLeaf.

    Checkpoints, optimizer states and hashes of weights are made of the names of leaves;
    STORED_NAMES keeps them as version 0.1 wrote them.
    """
    cls = dataclasses.dataclass(frozen=True)(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.name not in cls.STATIC]
    key = lambda name: jax.tree_util.GetAttrKey(cls.STORED_NAMES.get(name, name))

    def flatten(node):
        children = [(key(name), getattr(node, name)) for name in names]
        return children, tuple(getattr(node, name) for name in cls.STATIC)

    def unflatten(static, children):
        fields = dict(zip(names, children, strict=True))
        return cls(**fields, **dict(zip(cls.STATIC, static, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls


@_pytree
class Int8Weight(WeightLeaf):
    """codes * scale, with one scale an output channel (form w8)."""

    codes: Int8[Array, "... i o"]
    scale: Float[Array, "... 1 o"]

    @classmethod
    def from_float(cls, weight: Float[Array, "... i o"]) -> Self:
        """Rounds to the nearest code; the largest of a channel becomes 127."""
        scale = _rounding_scale(weight, axis=-2, largest_code=127)
        return cls(jnp.round(weight / scale).astype(jnp.int8), scale)

    @property
    def shape(self):
        return self.codes.shape

    def read(self):
        return self.codes * self.scale

    def product(self, x, dtype):
        out = x.astype(dtype) @ self.codes.astype(dtype)
        # in float32: rounding the scale would move a whole channel to one side
        return (out * align_channels(self.scale, out)).astype(dtype)


@_pytree
class Int8ActivationWeight(Int8Weight):
    """An Int8Weight multiplied with activations that become int8 too (form w8a8).

    Each token is rounded by its own largest value; sums are int32.
    """

    def product(self, x, dtype):
        x = x.astype(jnp.float32)
        scale = _rounding_scale(x, axis=-1, largest_code=127)
        codes = jnp.round(x / scale).astype(jnp.int8)
        contract = (((x.ndim - 1,), (0,)), ((), ()))
        out = jax.lax.dot_general(
            codes, self.codes, contract, preferred_element_type=jnp.int32
        )
        return (out * scale * align_channels(self.scale, out)).astype(dtype)


@_pytree
class Int4Weight(WeightLeaf):
    """codes * scale, a scale for each group of inputs of an output channel (form w4).

    Two codes of -7..7 to a byte, 8 added: neighbouring inputs, the first one below.
    """

    codes: UInt8[Array, "... groups half o"]
    scale: Float[Array, "... groups 1 o"]

    @classmethod
    def from_float(
        cls, weight: Float[Array, "... i o"], group_size: int, path: str = "the weight"
    ) -> Self:
        """Rounds to the nearest code; `path` names the weight in an error.

        Raises:
          UserError: the inputs do not divide into groups of this size.
        """
        *lead, inputs, out = weight.shape
        if inputs % group_size or group_size % 2:
            raise UserError(
                f"{path} has {inputs} inputs, which do not divide into groups of "
                f"{group_size}; take w4gN with an even N that divides {inputs}"
            )
        groups = weight.reshape(*lead, inputs // group_size, group_size, out)
        scale = _rounding_scale(groups, axis=-2, largest_code=7)
        codes = (jnp.round(groups / scale) + 8).astype(jnp.uint8)
        return cls(codes[..., ::2, :] | codes[..., 1::2, :] << 4, scale)

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


@_pytree
class LoRAWeight(WeightLeaf):
    """base + scale * lora_a @ lora_b, of which base is not trained.

    With a magnitude (DoRA) each output channel of that sum is brought to the length
    `magnitude`; the gradient takes the channel's own length for constant.
    dropout_keys: one a layer and row of the batch; without them nothing is dropped.

    Source: Hu et al., arXiv:2106.09685; Liu et al., arXiv:2402.09353.
    """

    TRAINABLE = ("lora_a", "lora_b", "magnitude")
    STATIC = ("scale", "dropout")
    STORED_NAMES: ClassVar = {
        "lora_a": "down",
        "lora_b": "up",
        "dropout_keys": "keys",
    }
    base: Array | WeightLeaf | None  # [..., in, out]
    lora_a: Float[Array, "... i rank"]
    lora_b: Float[Array, "... rank o"]
    magnitude: Float[Array, "... o"] | None = None
    dropout_keys: Key[Array, "... b"] | None = None
    scale: float = 1.0
    dropout: float = 0.0  # of the input

    @property
    def shape(self):
        return self.base.shape

    def read(self):
        # weights are merged for good, so exactly, whatever the device's default
        with jax.default_matmul_precision("highest"):
            weight = materialize(self.base) + self.scale * (self.lora_a @ self.lora_b)
            if self.magnitude is None:
                return weight
            return weight * self._gain()[..., None, :]

    def product(self, x, dtype):
        out, dropped = multiply(x, self.base, dtype), self._drop(x)
        lora_a, lora_b = self.lora_a.astype(dtype), self.lora_b.astype(dtype)
        hidden = training_product(dropped.astype(dtype), lora_a)
        update = training_product(hidden, self.scale * lora_b)
        if self.magnitude is None:
            return out + update
        gain = align_channels(self._gain().astype(dtype), out)
        if self.dropout_keys is None:
            return gain * (out + update)
        # as PEFT: all that training adds to the base's output sees the dropped input
        base_of_dropped = multiply(dropped, self.base, dtype)
        return out + (gain - 1) * base_of_dropped + gain * update

    def rows(self, index):
        update = self.lora_a[index] @ (self.scale * self.lora_b)
        return select_rows(self.base, index) + update

    def _gain(self):
        weight = materialize(self.base) + self.scale * (self.lora_a @ self.lora_b)
        length = jnp.sqrt(jnp.sum(weight**2, axis=-2))
        return self.magnitude / jax.lax.stop_gradient(length)

    def _drop(self, x):
        if self.dropout_keys is None:
            return x
        share = 1 - self.dropout
        draw = jax.vmap(lambda key, row: jax.random.bernoulli(key, share, row.shape))
        return jnp.where(draw(self.dropout_keys, x), x / share, 0)


@_pytree
class ExtraRows(WeightLeaf):
    """A label table with new rows before its last, which stays the null label's."""

    TRAINABLE = ("new_rows",)
    STORED_NAMES: ClassVar = {"new_rows": "more"}
    base: Array | WeightLeaf | None  # [classes, width]
    new_rows: Float[Array, "n width"]

    @property
    def shape(self):
        return (len(self.new_rows) + self.base.shape[0], self.base.shape[1])

    def read(self):
        base = materialize(self.base)
        return jnp.concatenate([base[:-1], self.new_rows, base[-1:]])


def _rounding_scale(values, axis, largest_code):
    """Returns the scales that bring the largest values along axis to largest_code."""
    largest = jnp.max(jnp.abs(values), axis=axis, keepdims=True)
    return jnp.where(largest > 0, largest, 1) / largest_code


def align_channels(vector: Float[Array, "..."], x: Array) -> Float[Array, "..."]:
    """Reshapes a vector [out] to as many axes as x [..., out]."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))


def is_weight_leaf(node: Any) -> bool:
    """Tells whether a node of a tree is one of the forms of this file."""
    return isinstance(node, WeightLeaf)


def flatten(tree: dict) -> dict[str, Any]:
    """Returns {path: array or WeightLeaf} of a tree of parameters."""
    return flatten_dict(tree, is_leaf=lambda _, node: is_weight_leaf(node), sep="/")


def materialize(tree: Any) -> Any:
    """Returns the same tree, or leaf, in plain arrays."""
    read = lambda node: node.read() if is_weight_leaf(node) else node
    return jax.tree.map(read, tree, is_leaf=is_weight_leaf)


def merge_adapters(tree: Any) -> Any:
    """Merges adapters and new rows into their base where that is an array, not int8."""

    def merge(node):
        base = node
        while isinstance(base, LoRAWeight | ExtraRows):
            base = base.base
        return node if is_weight_leaf(base) else materialize(node)

    return jax.tree.map(merge, tree, is_leaf=is_weight_leaf)


def multiply(
    x: Float[Array, "... i"], weight: Array | WeightLeaf, dtype: Any
) -> Float[Array, "... o"]:
    """Returns x times one layer's weight of any form."""
    if isinstance(weight, WeightLeaf):
        return weight.product(x, dtype)
    return x.astype(dtype) @ weight.astype(dtype)


def select_rows(
    table: Array | WeightLeaf, index: Int[Array, " b"]
) -> Float[Array, "b o"]:
    """Returns rows of a table of any form."""
    return table.rows(index) if isinstance(table, WeightLeaf) else table[index]


def split_trainable(tree: dict) -> tuple[dict, dict]:
    """Splits parameters into what is trained and what is frozen, for join.

    Without adapters or new rows everything is trained, and the second tree is empty.
    """
    nodes = jax.tree.leaves(tree, is_leaf=is_weight_leaf)
    if not any(is_weight_leaf(node) and node.TRAINABLE for node in nodes):
        return tree, {}
    return _half(tree, True), _half(tree, False)


def join(trained: Any, frozen: Any) -> Any:
    """Returns the tree that split_trainable split."""
    if trained is None or frozen is None or frozen == {}:
        return frozen if trained is None else trained
    if is_weight_leaf(trained):
        return trained.replace(base=join(trained.base, frozen.base))
    names = [*trained, *(name for name in frozen if name not in trained)]
    return {name: join(trained.get(name), frozen.get(name)) for name in names}


def _half(node, trained):
    """The half of a tree that is trained, or the other; None if there is none."""
    if isinstance(node, dict):
        halves = {name: _half(child, trained) for name, child in node.items()}
        return {n: half for n, half in halves.items() if half is not None} or None
    if not (is_weight_leaf(node) and node.TRAINABLE):
        return None if trained else node
    fields = {n: getattr(node, n) if trained else None for n in node.TRAINABLE}
    return node.replace(base=_half(node.base, trained), **fields)


def with_dropout_keys(tree: dict, keys: Key[Array, " b"]) -> dict:
    """Returns the tree with adapters that draw dropout from a key for each row."""

    def add_keys(path, node):
        if not (isinstance(node, LoRAWeight) and node.dropout):
            return node
        name = jax.tree_util.keystr(path).encode()
        own = jax.vmap(lambda key: jax.random.fold_in(key, zlib.crc32(name)))(keys)
        layers = lambda key: jax.random.split(key, node.lora_a.shape[:-2])
        return node.replace(dropout_keys=jax.vmap(layers, out_axes=-1)(own))

    return jax.tree_util.tree_map_with_path(add_keys, tree, is_leaf=is_weight_leaf)


def replace_weights(
    tree: dict, pattern: str, make: Callable[[str, Any], WeightLeaf]
) -> dict:
    """Replaces the matrices whose path matches a pattern by make(path, weight).

    Raises:
      UserError: the pattern matches no matrix; the nearest paths are named.
    """
    flat = flatten_dict(tree, sep="/")
    flat |= {path: make(path, flat[path]) for path in match_matrices(pattern, flat)}
    return unflatten_dict(flat, sep="/")


def match_matrices(pattern: str, paths: Iterable[str]) -> list[str]:
    """Returns the paths of matrices that a regular expression matches whole."""
    matrices = [path for path in paths if is_matrix(path)]
    if matches := list(full_matches(pattern, matrices)):
        return matches
    plain = regex.sub(r"[^\w/]+", "", pattern)
    near = difflib.get_close_matches(plain, matrices, 3, 0) or matrices[:3]
    raise UserError(f"{pattern!r} matches no weight; nearest: {', '.join(near)}")


def full_matches(
    pattern: str, texts: Iterable[str], seconds: float = PATTERN_SECONDS
) -> Iterable[str]:
    """Yields the texts that a regular expression matches whole.

    A pattern may come with a stranger's file, so it gets `seconds` for all of them.

    Raises:
      UserError: it is no regular expression, or matching takes too long.
    """
    deadline = time.monotonic() + seconds
    try:
        compiled = regex.compile(pattern)
        for text in texts:
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            if compiled.fullmatch(text, timeout=left):
                yield text
    except TimeoutError as error:
        raise UserError(f"the pattern {pattern[:80]!r} takes too long") from error
    except (regex.error, RecursionError, OverflowError) as error:
        line = f"{pattern[:80]!r} is no regular expression: {error}"
        raise UserError(line) from error


def require_finite(path: str, weight: Array) -> None:
    """Refuses to quantize a weight whose scales would be inf or nan."""
    if not bool(jnp.isfinite(weight).all()):
        raise UserError(f"{path} has values that are not finite: nothing to quantize")


def quantize_int8(path: str, weight: Float[Array, "... i o"]) -> Int8Weight:
    """Returns the weight in int8; `path` names it in an error."""
    require_finite(path, weight)
    return Int8Weight.from_float(weight)


def is_matrix(path: str) -> bool:
    """Tells whether a parameter multiplies a vector of features, or is a label table.

    The kernel of the patches is a convolution's, and the others are added.
    """
    *_, layer, name = ("", *path.split("/"))
    return name == "embedding" or (name == "kernel" and layer != "patch")
