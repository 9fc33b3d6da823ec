"""DiT and SiT: one transformer, two readings of its output.

Peebles and Xie, arXiv:2212.09748; Ma et al., arXiv:2401.08740. The blocks are stacked:
every block weight is one array with a leading axis for the layer.

Shapes: b images, t tokens, d features.
"""

import math
from typing import ClassVar

import flax.linen as nn
import numpy as np
from einops import rearrange
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from sit_jax.errors import UserError
from sit_jax.models.layers import (
    DTYPES,
    Attention,
    FinalLayer,
    Mlp,
    PatchEmbed,
    TimeLabelEmbed,
    choose,
    residual_block,
    scan_blocks,
    sincos_pos_embed_2d,
)
from sit_jax.parallel.mesh import shard_batch

SIZES = {
    "S": dict(depth=12, width=384, heads=6),
    "B": dict(depth=12, width=768, heads=12),
    "L": dict(depth=24, width=1024, heads=16),
    "XL": dict(depth=28, width=1152, heads=16),
}


class Transformer(nn.Module):
    """Fields and layers that DiT and MDT share; fields default to XL/2 on ImageNet.

    Attributes:
      depth: number of blocks.
      width: features of a token.
      heads: attention heads.
      patch: pixels along a side of a patch.
      mlp_ratio: hidden units of an MLP for each feature.
      classes: number of classes, which is also the null label.
      null_label: whether the table has a row for it; without one there is no guidance.
      learn_sigma: whether the output has a second half of channels, for the variance.
      dtype: "float32" or "bfloat16", of products and the residual stream.
      remat: what the backward pass keeps, a name in layers.REMAT.
      unroll: blocks in one turn of the loop over blocks.
      attention: a name in attention.NAMES.
    """

    depth: int = 28
    width: int = 1152
    heads: int = 16
    patch: int = 2
    mlp_ratio: float = 4.0
    classes: int = 1000
    null_label: bool = True
    learn_sigma: bool = True
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention: str = "auto"

    @nn.nowrap
    def embed_patches(
        self, x: Float[Array, "b s s c"], positions: Float[Array | np.ndarray, "1 t d"]
    ) -> Float[Array, "b t d"]:
        """Returns the tokens of images; call it in a compact method."""
        dtype, size = choose(DTYPES, self.dtype, "dtype"), (self.patch, self.patch)
        x = PatchEmbed(self.width, size, size, dtype=dtype, name="patch")(x)
        x = rearrange(x, "b h w d -> b (h w) d")
        return shard_batch((x + positions).astype(dtype))

    @nn.nowrap
    def embed_condition(
        self, t: Float[Array, " b"], y: Int[Array, " b"], frequency_shift: float = 0.0
    ) -> Float[Array, "b d"]:
        """Returns the condition of all blocks; call it in a compact method."""
        num_labels = self.classes + self.null_label
        embed = TimeLabelEmbed(self.width, num_labels, frequency_shift, name="cond")
        return embed(t, y)

    @nn.nowrap
    def predict_pixels(
        self, x: Float[Array, "b t d"], c: Float[Array, "b d"], channels: int
    ) -> Float[Array, "b s s out"]:
        """Returns predictions for data of so many channels; call it where compact."""
        p, side = self.patch, math.isqrt(x.shape[1])
        out = channels * (2 if self.learn_sigma else 1)
        x = FinalLayer(p * p * out, name="head")(x, c)  # (b, t, p * p * out)
        return rearrange(x, "b (h w) (p q c) -> b (h p) (w q) c", h=side, p=p, q=p)


class DiTBlock(nn.Module):
    """A block of DiT and SiT."""

    heads: int
    mlp_ratio: float
    dtype: Dtype
    norm2_epsilon: float
    attention: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], c: Float[Array, "b d"]
    ) -> tuple[Float[Array, "b t d"], None]:
        attention = Attention(self.heads, self.dtype, self.attention, name="attn")
        mlp = Mlp(self.mlp_ratio, self.dtype, name="mlp")
        x = residual_block(x, c, attention, mlp, self.norm2_epsilon)
        return x, None  # nothing for the scan to stack


class DiT(Transformer):
    """Diffusion transformer.

    diffusers' DiTTransformer2DModel computes with frequency_shift=1 and
    norm2_epsilon=1e-5, with whatever weights.

    Attributes:
      frequency_shift: see layers.timestep_frequencies.
      norm2_epsilon: of the norms before the MLPs.
    """

    frequency_shift: float = 0.0
    norm2_epsilon: float = 1e-6
    has_attention_bias: ClassVar[bool] = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "b s s c"], t: Float[Array, " b"], y: Int[Array, " b"]
    ) -> Float[Array, "b s s out"]:
        """Predicts from noisy data x at times t, given labels y.

        Args:
          x: noisy data.
          t: times; SiT's in [0, 1], DiT's are step numbers.
          y: labels; `classes` is the null label.

        Returns:
          The prediction in float32, with 2 c channels if learn_sigma, else c.

        Raises:
          UserError: fields that no network can have, or that do not fit x.
        """
        check_shapes(self, x.shape)
        channels, side = x.shape[-1], x.shape[1] // self.patch
        x = self.embed_patches(x, sincos_pos_embed_2d(side, self.width)[None])
        c = self.embed_condition(t, y, self.frequency_shift)
        blocks = scan_blocks(DiTBlock, self.depth, self.remat, self.unroll)(
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            dtype=DTYPES[self.dtype],
            norm2_epsilon=self.norm2_epsilon,
            attention=self.attention,
            name="blocks",
        )
        x, _ = blocks(x, c)
        return self.predict_pixels(x, c, channels)


class SiT(DiT):
    """DiT without the variance half, which released weights carry but never use."""

    def __call__(
        self, x: Float[Array, "b s s c"], t: Float[Array, " b"], y: Int[Array, " b"]
    ) -> Float[Array, "b s s c"]:
        """Predicts as DiT does; returns only the first c channels."""
        return super().__call__(x, t, y)[..., : x.shape[-1]]


def check_shapes(model: Transformer, shape: tuple[int, ...]) -> None:
    """Checks a network's fields against each other and data of shape [b, h, w, c].

    Raises:
      UserError: they do not fit; the error names the remedy.
    """
    _, height, width, _ = shape
    for name in ("depth", "width", "heads", "patch", "mlp_ratio", "classes", "unroll"):
        if not 0 < (value := getattr(model, name)) < math.inf:
            raise UserError(f"model.{name} is {value}: it must be positive and finite")
    if height != width:
        raise UserError(f"input is {height} x {width}: only square inputs work")
    width, heads, patch = model.width, model.heads, model.patch
    for rule, number, divisor in (
        (f"input side {height} is not divisible by patch {patch}", height, patch),
        (f"width {width} is not divisible by heads {heads}", width, heads),
        (f"width {width} is not divisible by 4, as the position table needs", width, 4),
    ):
        if number % divisor:
            raise UserError(f"{rule}: choose another")
