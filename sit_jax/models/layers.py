"""Layers shared by DiT, SiT and MDT.

Parameters are always float32. `dtype` is what the wide matrix products of the blocks
and the residual stream run in; norms, softmax, the time embedding and the output stay
in float32, where bfloat16 would lose digits that nothing downstream restores.

Shapes: b images, t tokens, d features, h heads.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax.linen.dtypes import promote_dtype
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from sit_jax.errors import UserError
from sit_jax.models.attention import SAVED_NAME, choose_attention, packed_attention
from sit_jax.models.attention_tpu import heads_first_attention
from sit_jax.parallel.mesh import HEADS, shard_batch, shard_heads, unshard_weight

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}

# What the backward pass keeps of a block.
REMAT: dict[str, Callable | None] = {
    # everything
    "none": None,
    # products with weights (of qkv with its bias) and the results of attention
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(SAVED_NAME),
    ),
    # only the block's input
    "full": jax.checkpoint_policies.nothing_saveable,
    # products with weights, moved to the host's memory
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims(
        "device", "pinned_host"
    ),
}


class Dense(nn.Dense):
    """Linear layer with Xavier-uniform weights [in, out] and zero bias, as in DiT.

    Attributes:
      split: mesh axes over which the weight stays split while it is multiplied.
      heads: if given, the layer computes q, k and v of so many heads at once and
        returns them as [3, heads, b, d / heads, t], the layout of attention_tpu.py;
        they never exist in another layout.
    """

    kernel_init: nn.initializers.Initializer = nn.initializers.xavier_uniform()
    split: tuple = (None, None)
    heads: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "..."]:
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        kernel = unshard_weight(kernel, *self.split)
        if self.heads:
            kernel = rearrange(kernel, "i (n h d) -> i n h d", n=3, h=self.heads)
            bias = rearrange(bias, "(n h d) -> n h 1 d 1", n=3, h=self.heads)
            return jnp.einsum("bti,inhd->nhbdt", x, kernel) + bias
        out = self.product(x, kernel)
        return out + jnp.expand_dims(bias, range(out.ndim - 1))

    def product(self, x: Array, kernel: Array) -> Array:
        """Returns x times the weight.

        It is a method of its own because adapters.applied replaces it in training by
        attention_cpu.training_product.
        """
        return jnp.dot(x, kernel)


class PatchEmbed(nn.Conv):
    """Maps each patch of [b, h, w, c] to a token: [b, h / p, w / p, d].

    Xavier's fans are those of the [p * p * c, d] matrix; over a convolution kernel the
    default would count d once per pixel.
    """

    padding: str = "VALID"
    kernel_init: nn.initializers.Initializer = nn.initializers.variance_scaling(
        1.0, "fan_avg", "uniform", in_axis=(0, 1, 2), out_axis=3
    )


class Attention(nn.Module):
    """Multi-head self-attention: tokens [b, t, d] -> [b, t, d].

    The columns of the layer "qkv" are ordered (q k v, head).
    """

    heads: int
    dtype: Dtype = jnp.float32
    implementation: str = "auto"  # of attention.NAMES

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        bias: Float[Array, "#b #h t t"] | None = None,
        mask: Bool[Array, "#b #h #t t"] | None = None,
    ) -> Float[Array, "b t d"]:
        width, heads, dtype = x.shape[-1], self.heads, self.dtype
        name = choose_attention(
            self.implementation, dtype, width // heads, has_bias=bias is not None
        )
        if name == "heads_first":
            qkv = Dense(3 * width, dtype=dtype, heads=heads, name="qkv")(x)
            q, k, v = (shard_heads(part) for part in checkpoint_name(qkv, SAVED_NAME))
            x = heads_first_attention(q, k, v, bias, mask)
            x = rearrange(x, "h b d t -> b t (h d)")
        else:
            qkv = Dense(3 * width, dtype=dtype, name="qkv")(x)
            qkv = checkpoint_name(qkv, SAVED_NAME)
            qkv = rearrange(qkv, "b t (n h d) -> b t n h d", n=3, h=heads)
            x = packed_attention(qkv, bias, mask, implementation=name)
            x = rearrange(x, "b t h d -> b t (h d)")
        return Dense(width, dtype=dtype, split=(HEADS, None), name="proj")(x)


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    ratio: float = 4.0  # hidden units for each feature
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        width = x.shape[-1]
        hidden = int(width * self.ratio)
        x = Dense(hidden, dtype=self.dtype, split=(None, HEADS), name="fc1")(x)
        x = gelu(shard_batch(x, None, HEADS))
        return Dense(width, dtype=self.dtype, split=(HEADS, None), name="fc2")(x)


class TimeLabelEmbed(nn.Module):
    """Embeds times and labels, and adds the two: the condition c of all blocks."""

    width: int
    num_labels: int  # rows of the table, the null label's among them
    frequency_shift: float = 0.0  # see timestep_frequencies

    @nn.compact
    def __call__(
        self, t: Float[Array, " b"], y: Int[Array, " b"]
    ) -> Float[Array, "b d"]:
        normal = nn.initializers.normal(0.02)
        waves = timestep_embedding(t, shift=self.frequency_shift)
        t = nn.Dense(self.width, kernel_init=normal, name="time_in")(waves)
        t = nn.Dense(self.width, kernel_init=normal, name="time_out")(nn.silu(t))
        table = nn.Embed(
            self.num_labels, self.width, embedding_init=normal, name="label"
        )
        return shard_batch(t + table(y))


class FinalLayer(nn.Module):
    """Maps tokens [b, t, d] to pixels of patches [b, t, out], in float32."""

    out: int

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], c: Float[Array, "b d"]
    ) -> Float[Array, "b t out"]:
        shift, scale = adaln_params(2, c)
        x = modulate(layer_norm("norm")(x), shift, scale)
        return nn.Dense(self.out, kernel_init=nn.initializers.zeros, name="out")(x)


@jax.custom_jvp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x (1 + tanh(u)) / 2, u = sqrt(2 / pi) (x + 0.044715 x^3), as torch."""
    return nn.gelu(x, approximate=True)


@gelu.defjvp
def _gelu_jvp(primals, tangents):
    """Differentiates by (1 + tanh(u)) / 2 = sigmoid(2 u), in float32 at least.

    XLA on a CPU would store tanh(u) for this derivative, and again when it is
    recomputed; the logistic function it computes anew.
    """
    (x,), (tangent,) = primals, tangents
    wide = x.astype(jnp.promote_types(x.dtype, "float32"))
    root = math.sqrt(2 / math.pi)
    s = nn.sigmoid(2 * root * (wide + 0.044715 * wide**3))
    slope = s + wide * s * (1 - s) * 2 * root * (1 + 3 * 0.044715 * wide**2)
    return gelu(x), slope.astype(x.dtype) * tangent


def layer_norm(name: str, epsilon: float = 1e-6) -> nn.LayerNorm:
    """Returns a layer norm without scale and bias, in float32.

    It takes two passes as torch does: E[x^2] - E[x]^2 cancels in float32.
    """
    return nn.LayerNorm(
        epsilon=epsilon,
        use_bias=False,
        use_scale=False,
        use_fast_variance=False,
        dtype=jnp.float32,
        name=name,
    )


def modulate(
    x: Float[Array, "b t d"], shift: Float[Array, "b 1 d"], scale: Float[Array, "b 1 d"]
) -> Float[Array, "b t d"]:
    """Returns x (1 + scale) + shift in x's float32, where 1 + scale is not rounded."""
    return x * (1 + scale.astype(x.dtype)) + shift.astype(x.dtype)


def adaln_params(
    count: int, c: Float[Array, "b d"], dtype: Dtype = jnp.float32
) -> list[Float[Array, "b 1 d"]]:
    """Returns `count` modulations computed from c, all zero at initialization.

    Call it in a compact module; the layer is named "adaLN".
    """
    zeros = nn.initializers.zeros
    dense = Dense(count * c.shape[-1], dtype=dtype, kernel_init=zeros, name="adaLN")
    return jnp.split(dense(nn.silu(c))[:, None], count, axis=-1)


def residual_block(
    x: Float[Array, "b t d"],
    c: Float[Array, "b d"],
    attention: Callable[[Array], Array],
    mlp: nn.Module,
    norm2_epsilon: float = 1e-6,
) -> Float[Array, "b t d"]:
    """Adds attention and MLP to x, each with adaLN-Zero: scaled, shifted, gated by c.

    Call it in a compact module; the layers are named "adaLN", "norm1" and "norm2".
    """
    shift1, scale1, gate1, shift2, scale2, gate2 = adaln_params(6, c, mlp.dtype)
    y = modulate(layer_norm("norm1")(x), shift1, scale1)
    x = shard_batch(x + gate1 * attention(y))
    y = modulate(layer_norm("norm2", norm2_epsilon)(x), shift2, scale2)
    return shard_batch(x + gate2 * mlp(y))


def timestep_frequencies(half: int, shift: float = 0.0) -> Float[np.ndarray, " half"]:
    """Returns 10000^(-i / (half - shift)) for i < half, in float32.

    shift is 0 in the releases of DiT, SiT and MDT, and 1 in diffusers' DiT.

    At t = 999 one unit in the last place moves the embedding by 6e-5, so rounding is
    part of the definition: float32 exponent, correctly rounded exp. Of the obvious
    formulas this agrees best with the released code (125 of 128 entries).
    """
    exponent = np.float32(-math.log(10_000)) * np.arange(half, dtype=np.float32)
    exponent = (exponent / np.float32(half - shift)).astype(np.float64)
    return np.exp(exponent).astype(np.float32)


def timestep_embedding(
    t: Float[Array, " b"], width: int = 256, shift: float = 0.0
) -> Float[Array, "b width"]:
    """Returns cosines, then sines, of t times geometric frequencies."""
    frequencies = timestep_frequencies(width // 2, shift)
    angles = t[:, None].astype(jnp.float32) * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_pos_embed_2d(side: int, width: int) -> Float[np.ndarray, "t d"]:
    """Returns the fixed sine-cosine embedding of a grid, [side * side, width].

    The first half of the channels encodes the column, the second the row; each half
    holds sines, then cosines.
    """
    columns, rows = np.meshgrid(np.arange(side), np.arange(side))
    omega = 1 / 10_000 ** (np.arange(width // 4) / (width / 4))
    angles = (np.outer(position.ravel(), omega) for position in (columns, rows))
    waves = [fn(angle) for angle in angles for fn in (np.sin, np.cos)]
    return np.concatenate(waves, axis=1).astype(np.float32)


def scan_blocks(
    block: type[nn.Module],
    length: int,
    remat: str = "none",
    unroll: int = 1,
    in_axes: Any = nn.broadcast,
) -> Callable[..., nn.Module]:
    """Returns `length` blocks as one module, whose weights have a leading axis.

    Args:
      block: its __call__(x, *inputs) returns the new x, and what is to be stacked.
      length: number of blocks.
      remat: a name in REMAT.
      unroll: blocks in one turn of the loop.
      in_axes: for each of *inputs, nn.broadcast or the axis that the blocks share out.
    """
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


def choose(table: Mapping[str, Any], name: str, field: str) -> Any:
    """Returns table[name].

    Raises:
      UserError: there is no such name; the error lists those there are.
    """
    if name not in table:
        raise UserError(f"{field} is {name!r}: choose one of {', '.join(table)}")
    return table[name]
