"""LoRA: which weights are adapted, and how the adapters begin.

Hu et al., arXiv:2106.09685; the names and the start are those of PEFT's LoraConfig.
"""

import dataclasses
import math
import zlib

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from sit_jax.adapters.stored import (
    Adapted,
    Grown,
    Quantized,
    matched,
    quantize,
    read,
    replace,
    to_int8,
)
from sit_jax.errors import UserError

TABLE = "cond/label/embedding"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Settings of a run that trains adapters instead of a network's weights.

    targets, int8: regular expressions over the paths of the base's matrices (the
    label table is cond/label/embedding). An update is alpha / rank times the
    product of an adapter's two matrices, alpha / sqrt(rank) if rank_stabilized
    (arXiv:2312.03732). dora: also train lengths (arXiv:2402.09353). new_classes: rows
    to add to the label table. int8: what of the base is kept so (QLoRA).
    """

    targets: str = ".*blocks/(attn/(qkv|proj)|mlp/fc[12])/kernel"
    rank: int = 8
    alpha: float = 8.0
    rank_stabilized: bool = False
    dropout: float = 0.0
    dora: bool = False
    new_classes: int = 0
    int8: str | None = None

    def __post_init__(self):
        if self.rank < 1:
            raise UserError(f"adapter.rank is {self.rank}; it must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"adapter.dropout is {self.dropout}; it must be in [0, 1)")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise UserError(f"adapter.alpha is {self.alpha}; it must be positive")
        if self.new_classes < 0:
            raise UserError(f"adapter.new_classes is {self.new_classes}; at least 0")

    @property
    def scale(self):
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)

    def compressed(self, base):
        """The base as it is kept: int8 where the settings say so."""
        return base if self.int8 is None else replace(base, self.int8, quantize)

    def compressed_shapes(self, base):
        """The same of shapes."""
        if self.int8 is None:
            return base
        store = lambda path, weight: Quantized(*to_int8(weight))
        return jax.eval_shape(lambda base: replace(base, self.int8, store), base)

    def __call__(self, base, key):
        """The base with adapters that change nothing yet."""
        if self.new_classes:
            base = replace(base, TABLE, self._with_rows)
        return replace(base, self.targets, lambda *at: self._adapted(*at, key))

    def _with_rows(self, path, table):
        """New classes begin as the null label."""
        return Grown(table, jnp.tile(read(table)[-1:], (self.new_classes, 1)))

    def _adapted(self, path, weight, key):
        *lead, fan_in, fan_out = weight.shape
        key = jax.random.fold_in(key, zlib.crc32(path.encode()))
        down, up = (*lead, fan_in, self.rank), (*lead, self.rank, fan_out)
        if path.endswith("/embedding"):  # a row of `down` is chosen, so that is zero
            if self.dora:
                raise UserError(f"adapter.dora is for products, {path} is a table")
            down, up = jnp.zeros(down), jax.random.normal(key, up)
        else:  # torch's kaiming_uniform_ with a = sqrt(5)
            bound = fan_in**-0.5
            down = jax.random.uniform(key, down, minval=-bound, maxval=bound)
            up = jnp.zeros(up)
        length = jnp.sqrt(jnp.sum(read(weight) ** 2, axis=-2)) if self.dora else None
        how = {"scale": self.scale, "dropout": self.dropout}
        return Adapted(weight, down, up, length, **how)


def check(settings, shapes):
    """Refuses settings that do not fit a base of these shapes."""
    flat = flatten_dict(shapes, sep="/")
    for pattern in filter(None, (settings.targets, settings.int8)):
        matched(pattern, flat)
