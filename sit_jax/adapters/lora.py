"""LoRA: which weights are adapted, and how the adapters begin.

Source: Hu et al., arXiv:2106.09685. Names and initial values are those of PEFT's
LoraConfig.
"""

import dataclasses
import zlib
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from sit_jax.adapters.weights import (
    LABEL_TABLE,
    ExtraRows,
    Int8Weight,
    LoRAWeight,
    materialize,
    quantize_int8,
    replace_weights,
)
from sit_jax.errors import UserError
from sit_jax.ranges import COUNT, Above, AtLeast, Between


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Settings of a run that trains adapters instead of a network's weights.

    Args:
      targets: regular expression over the paths of the base's matrices (the label table
        is cond/label/embedding).
      rank: inner size of the two matrices of an adapter.
      alpha: the update is alpha / rank times the product of the two matrices.
      rank_stabilized: alpha / sqrt(rank) instead (arXiv:2312.03732).
      dropout: share of an adapter's input that training drops.
      dora: also train the length of each output channel (arXiv:2402.09353).
      new_classes: rows to add to the label table.
      int8: regular expression of what of the base is kept in int8 (QLoRA).
    """

    targets: str = ".*blocks/(attn/(qkv|proj)|mlp/fc[12])/kernel"
    rank: Annotated[int, COUNT] = 8
    alpha: Annotated[float, Above(0.0)] = 8.0
    rank_stabilized: bool = False
    dropout: Annotated[float, Between(0.0, 1.0)] = 0.0
    dora: bool = False
    new_classes: Annotated[int, AtLeast(0)] = 0
    int8: str | None = None

    def __post_init__(self):
        if self.dropout == 1:
            raise UserError("adapter.dropout is 1, which leaves no input; take less")

    @property
    def scale(self) -> float:
        """Factor of the product of an adapter's two matrices."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def quantize_base(self, base: dict) -> dict:
        """Returns the base as it is kept: in int8 where the settings say so.

        Raises:
          UserError: a weight to quantize is not finite.
        """
        if self.int8 is None:
            return base
        return replace_weights(base, self.int8, quantize_int8)

    def quantized_base_shapes(self, base: dict) -> dict:
        """Returns the shapes that quantize_base gives for shapes."""
        if self.int8 is None:
            return base
        make = lambda path, weight: Int8Weight.from_float(weight)
        return jax.eval_shape(
            partial(replace_weights, pattern=self.int8, make=make), base
        )

    def add_adapters(self, base: dict, key: Key[Array, ""]) -> dict:
        """Returns the base with adapters that change nothing yet."""
        if self.new_classes:
            base = replace_weights(base, LABEL_TABLE, self._add_rows)
        make = lambda path, weight: self._adapt(path, weight, key)
        return replace_weights(base, self.targets, make)

    def _add_rows(self, path, table):
        """New classes begin as the null label."""
        null_row = materialize(table)[-1:]
        return ExtraRows(table, jnp.tile(null_row, (self.new_classes, 1)))

    def _adapt(self, path, weight, key):
        *lead, fan_in, fan_out = weight.shape
        key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        shape_a, shape_b = (*lead, fan_in, self.rank), (*lead, self.rank, fan_out)
        if path.endswith("/embedding"):  # a row of lora_a is selected, so that is zero
            if self.dora:
                raise UserError(f"adapter.dora is for products, {path} is a table")
            lora_a, lora_b = jnp.zeros(shape_a), jax.random.normal(key, shape_b)
        else:  # torch's kaiming_uniform_ with a = sqrt(5)
            bound = fan_in**-0.5
            lora_a = jax.random.uniform(key, shape_a, minval=-bound, maxval=bound)
            lora_b = jnp.zeros(shape_b)
        magnitude = None
        if self.dora:
            magnitude = jnp.sqrt(jnp.sum(materialize(weight) ** 2, axis=-2))
        return LoRAWeight(
            base=weight,
            lora_a=lora_a,
            lora_b=lora_b,
            magnitude=magnitude,
            scale=self.scale,
            dropout=self.dropout,
        )
