"""Layers shared by DiT, SiT and MDT.

Parameters are always float32. `dtype` is what the wide matrix products of the blocks
and the residual stream run in; norms, softmax, the time embedding and the output stay
in float32, where bfloat16 would lose digits that nothing downstream restores.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.linen.dtypes import promote_dtype
from jax.ad_checkpoint import checkpoint_name

from sit_jax.errors import UserError
from sit_jax.models.attention import attend_packed, chosen, turns
from sit_jax.models.by_head import KEPT
from sit_jax.parallel.sharding import HEADS, by_heads, by_rows, gathered

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# What the backward pass keeps of a block: everything (none), the results of products
# with weights (dots; of qkv with its bias, and of attention by turns), those
# moved to host memory (offload), only its input (full).
REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(KEPT),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    ),
}


class Dense(nn.Dense):
    """Xavier-uniform weight [in, out], zero bias: torch's Linear as DiT starts it.

    split: mesh axes over which the weight stays split while it is multiplied. heads:
    the result of [B, T, in] is heads_first's, and never lies there in another layout.
    """

    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    split: tuple = (None, None)
    heads: int | None = None

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        kernel = gathered(kernel, *self.split)
        if self.heads:
            kernel = rearrange(kernel, "i (n h d) -> i n h d", n=3, h=self.heads)
            bias = rearrange(bias, "(n h d) -> n h 1 d 1", n=3, h=self.heads)
            return jnp.einsum("bti,inhd->nhbdt", x, kernel) + bias
        out = self.times(x, kernel)
        return out + jnp.expand_dims(bias, range(out.ndim - 1))

    def times(self, x, kernel):
        """Of its own, since applied.trained puts another product in its place."""
        return jnp.dot(x, kernel)


class Patches(nn.Conv):
    """x [B, H, W, C] -> [B, H/p, W/p, D], the linear map of non-overlapping patches.

    Xavier's fans are those of the [p * p * C, D] matrix; over a convolution kernel the
    default would count D once per pixel.
    """

    padding: str = "VALID"
    kernel_init: nn.initializers.Initializer = nn.initializers.variance_scaling(
        1.0, "fan_avg", "uniform", in_axis=(0, 1, 2), out_axis=3
    )


class Attention(nn.Module):
    """tokens [B, T, D] -> [B, T, D]; the columns of qkv are ordered (q k v, head)."""

    heads: int
    dtype: jnp.dtype = jnp.float32
    program: str = "auto"  # of attention.NAMES

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        x = attended(x, self.heads, self.dtype, self.program)
        kept = (HEADS, None)
        return Dense(width, dtype=self.dtype, split=kept, name="proj")(x)


class Mlp(nn.Module):
    ratio: float = 4.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        hidden, how = int(width * self.ratio), {"dtype": self.dtype}
        x = Dense(hidden, split=(None, HEADS), name="fc1", **how)(x)
        x = gelu(by_rows(x, None, HEADS))
        return Dense(width, split=(HEADS, None), name="fc2", **how)(x)


class Conditioning(nn.Module):
    """t [B], y int [B] -> [B, D] float32, from a table of `labels` rows."""

    width: int
    labels: int
    frequency_shift: float = 0.0  # see frequencies

    @nn.compact
    def __call__(self, t, y):
        small = nn.initializers.normal(0.02)
        waves = fourier(t, shift=self.frequency_shift)
        t = nn.Dense(self.width, kernel_init=small, name="time_in")(waves)
        t = nn.Dense(self.width, kernel_init=small, name="time_out")(nn.silu(t))
        table = nn.Embed(self.labels, self.width, embedding_init=small, name="label")
        return by_rows(t + table(y))


class Head(nn.Module):
    """tokens [B, T, D], c [B, D] -> [B, T, out], in float32 throughout."""

    out: int

    @nn.compact
    def __call__(self, x, c):
        shift, scale = modulation(2, c)
        x = modulate(norm("norm")(x), shift, scale)
        return nn.Dense(self.out, kernel_init=nn.initializers.zeros, name="out")(x)


@jax.custom_jvp
def gelu(x):
    """x (1 + tanh(u)) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3), as torch has it."""
    return nn.gelu(x, approximate=True)


@gelu.defjvp
def _gelu_slope(primals, tangents):
    """By the logistic function, (1 + tanh(u)) / 2 = s(2 u), in float32 at least.

    Were it tanh, a CPU would write it down for this and for what is computed again.
    """
    (x,), (move,) = primals, tangents
    wide = x.astype(jnp.promote_types(x.dtype, "float32"))
    root = math.sqrt(2 / math.pi)
    s = nn.sigmoid(2 * root * (wide + 0.044715 * wide**3))
    slope = s + wide * s * (1 - s) * 2 * root * (1 + 3 * 0.044715 * wide**2)
    return gelu(x), slope.astype(x.dtype) * move


def attended(x, heads, dtype, program, bias=None, mask=None):
    """tokens [B, T, D] -> [B, T, D], through a layer "qkv" and attention; in a module.

    The columns of qkv are ordered (q k v, head).
    """
    width = x.shape[-1]
    layer = partial(Dense, 3 * width, dtype=dtype, name="qkv")
    if chosen(program, dtype, width // heads, bias is not None) == "heads_first":
        parts = checkpoint_name(layer(heads=heads)(x), KEPT)
        q, k, v = (by_heads(part) for part in parts)
        return rearrange(turns(q, k, v, bias, mask), "h b d t -> b t (h d)")
    x = checkpoint_name(layer()(x), KEPT)
    parts = rearrange(x, "b t (n h d) -> b t n h d", n=3, h=heads)
    return rearrange(attend_packed(parts, bias, mask, program), "b t h d -> b t (h d)")


def norm(name, epsilon=1e-6):
    """No affine part, two passes as in torch: E[x^2] - E[x]^2 cancels in float32."""
    return nn.LayerNorm(
        epsilon=epsilon,
        use_bias=False,
        use_scale=False,
        use_fast_variance=False,
        dtype=jnp.float32,
        name=name,
    )


def modulate(x, shift, scale):
    """x float32 [B, T, D]; 1 + scale must not be rounded to bfloat16."""
    return x * (1 + scale.astype(x.dtype)) + shift.astype(x.dtype)


def modulation(n, c, dtype=jnp.float32):
    """c [B, D] -> n arrays [B, 1, D], all zero at initialization."""
    zeros = nn.initializers.zeros
    dense = Dense(n * c.shape[-1], dtype=dtype, kernel_init=zeros, name="adaLN")
    return jnp.split(dense(nn.silu(c))[:, None], n, axis=-1)


def frequencies(half, shift=0.0, period=10_000.0):
    """period^(-i / (half - shift)), i < half, as float32 [half].

    shift is 0 in the releases of DiT, SiT and MDT, and 1 in diffusers' DiT.

    At t = 999 one unit in the last place moves the embedding by 6e-5, so rounding is
    part of the definition: float32 exponent, correctly rounded exp. Of the obvious
    formulas this agrees best with the released code (125 of 128 entries).
    """
    exponent = np.float32(-math.log(period)) * np.arange(half, dtype=np.float32)
    exponent = (exponent / np.float32(half - shift)).astype(np.float64)
    return np.exp(exponent).astype(np.float32)


def fourier(t, width=256, shift=0.0):
    """t [B] -> cosines then sines of t at geometric frequencies, [B, width]."""
    angles = t[:, None].astype(jnp.float32) * frequencies(width // 2, shift)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def grid_embedding(side, width):
    """Fixed sine-cosine embedding of a side x side grid, float32 [side * side, width].

    The first half of the channels tells the column, the second the row.
    """
    columns, rows = np.meshgrid(np.arange(side), np.arange(side))
    omega = 1 / 10_000 ** (np.arange(width // 4) / (width / 4))
    axis = lambda position: np.outer(position.ravel(), omega)
    waves = [f(axis(p)) for p in (columns, rows) for f in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1).astype(np.float32)


def stack(block, length, remat="none", unroll=1, in_axes=nn.broadcast):
    """`length` blocks whose weights are stacked along a leading axis, run by a scan."""
    policy = choose(REMAT, remat, "remat")
    if policy is not None:
        # A loop already keeps XLA from merging the recomputation with the forward
        # pass; a fully unrolled one needs the barrier.
        block = nn.remat(block, policy=policy, prevent_cse=unroll >= length)
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        in_axes=in_axes,
        length=length,
        unroll=unroll,
    )


def choose(table, name, field):
    """table[name], or a UserError with the names there are."""
    if name not in table:
        raise UserError(f"{field} is {name!r}: choose one of {', '.join(table)}")
    return table[name]
