"""DiT and SiT: one transformer, two readings of its output.

Peebles and Xie, arXiv:2212.09748; Ma et al., arXiv:2401.08740. The blocks are stacked:
every block weight is one array with a leading axis L.
"""

import math

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

from sit_jax.errors import UserError
from sit_jax.models.layers import (
    DTYPES,
    Attention,
    Conditioning,
    Head,
    Mlp,
    Patches,
    choose,
    grid_embedding,
    modulate,
    modulation,
    norm,
    stack,
)
from sit_jax.parallel.sharding import by_rows

SIZES = {
    "S": dict(depth=12, width=384, heads=6),
    "B": dict(depth=12, width=768, heads=12),
    "L": dict(depth=24, width=1024, heads=16),
    "XL": dict(depth=28, width=1152, heads=16),
}


class Block(nn.Module):
    heads: int
    mlp_ratio: float = 4.0
    dtype: jnp.dtype = jnp.float32
    norm2_epsilon: float = 1e-6
    attention: str = "auto"

    @nn.compact
    def __call__(self, x, c):
        """tokens [B, T, D], c [B, D] -> tokens, and nothing to stack."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation(6, c, self.dtype)
        y = modulate(norm("norm1")(x), shift1, scale1)
        attention = Attention(self.heads, self.dtype, self.attention, name="attn")
        x = by_rows(x + gate1 * attention(y))
        y = modulate(norm("norm2", self.norm2_epsilon)(x), shift2, scale2)
        x = by_rows(x + gate2 * Mlp(self.mlp_ratio, self.dtype, name="mlp")(y))
        return x, None


class DiT(nn.Module):
    """Fields default to XL/2 on ImageNet; `classes` is also the null label's number.

    diffusers' DiTTransformer2DModel computes with frequency_shift=1 and
    norm2_epsilon=1e-5, with whatever weights.
    """

    depth: int = 28
    width: int = 1152
    heads: int = 16
    patch: int = 2
    mlp_ratio: float = 4.0
    classes: int = 1000
    null_label: bool = True  # a row for it; without one there is no guidance
    learn_sigma: bool = True
    frequency_shift: float = 0.0
    norm2_epsilon: float = 1e-6
    dtype: str = "float32"
    remat: str = "none"
    unroll: int = 1
    attention: str = "auto"  # the program that computes it, of attention.NAMES
    biased = False  # its scores get no bias

    @nn.compact
    def __call__(self, x, t, y):
        """x [B, H, W, C], t [B], y [B] -> float32 [B, H, W, 2C], or C without sigma."""
        check(self, x.shape)
        dtype = choose(DTYPES, self.dtype, "dtype")
        side, p = x.shape[1] // self.patch, self.patch
        out = x.shape[-1] * (2 if self.learn_sigma else 1)
        x = Patches(self.width, (p, p), (p, p), dtype=dtype, name="patch")(x)
        x = rearrange(x, "b h w d -> b (h w) d")
        x = by_rows((x + grid_embedding(side, self.width)[None]).astype(dtype))
        labels = self.classes + self.null_label
        shift, epsilon = self.frequency_shift, self.norm2_epsilon
        c = Conditioning(self.width, labels, shift, name="cond")(t, y)
        blocks = stack(Block, self.depth, self.remat, self.unroll)
        block = (self.heads, self.mlp_ratio, dtype, epsilon, self.attention)
        x, _ = blocks(*block, name="blocks")(x, c)
        x = Head(p * p * out, name="head")(x, c)
        return rearrange(
            x, "b (h w) (p q c) -> b (h p) (w q) c", h=side, p=p, q=p, c=out
        )


class SiT(DiT):
    """Drops the variance half, which the released weights carry but never use."""

    def __call__(self, x, t, y):
        """x [B, H, W, C], t [B], y [B] -> float32 [B, H, W, C]."""
        return super().__call__(x, t, y)[..., : x.shape[-1]]


def macs(model, shape):
    """Multiply-adds of one forward pass over one image [H, W, C], attention included.

    What the papers' tables call GFLOPs; floating-point operations are twice as many.
    """
    height, width, channels = shape
    d, pixels = model.width, model.patch**2 * channels
    tokens = height * width // model.patch**2
    out = pixels * (2 if model.learn_sigma else 1)
    hidden = int(d * model.mlp_ratio)
    block = tokens * (4 * d * d + 2 * d * hidden + 2 * tokens * d) + 6 * d * d
    ends = tokens * d * (pixels + out) + 256 * d + d * d + 2 * d * d
    return model.depth * block + ends


def check(model, shape):
    """Refuses what no network can be, or cannot do with data [B, H, W, C]."""
    _, height, width, _ = shape
    for name in ("depth", "width", "heads", "patch", "classes", "unroll"):
        if (value := getattr(model, name)) < 1:
            raise UserError(f"model.{name} is {value}: it must be at least 1")
    if not 1 <= model.width * model.mlp_ratio < math.inf:
        raise UserError(
            f"model.mlp_ratio is {model.mlp_ratio}: a layer of width {model.width} "
            "needs a number that leaves it units"
        )
    for name in ("frequency_shift", "norm2_epsilon"):
        value = getattr(model, name, 0)
        if not 0 <= value < math.inf:
            raise UserError(f"model.{name} is {value}: a number from 0 on")
    if height != width:
        raise UserError(f"input is {height} x {width}: only square inputs work")
    if height % model.patch:
        raise UserError(
            f"input side {height} is not divisible by patch {model.patch}: "
            "choose another patch or data of another size"
        )
    if model.width % model.heads:
        raise UserError(
            f"width {model.width} is not divisible by heads {model.heads}: change one"
        )
    if model.width % 4:
        raise UserError(
            f"width {model.width} is not divisible by 4, as the position table needs: "
            "choose another width"
        )
