"""Attention: softmax(q k' / sqrt(d) + bias) v, by the program that fits the device.

All implementations sum in float32 and give the same numbers but for rounding. "xla" is
the plain one, jax.nn.dot_product_attention. The others are quicker on one kind of
device, as measured in docs/evidence/performance.md; model.attention=xla turns them off.

Shapes: b images, t queries, s keys, h heads, d values of a head.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from sit_jax.errors import UserError
from sit_jax.models.attention_cpu import (
    SAVED_NAME,
    head_by_head,
    head_by_head_packed,
    is_worth_a_loop,
)
from sit_jax.models.attention_tpu import heads_first
from sit_jax.parallel.mesh import HEADS, shard_batch

__all__ = ["SAVED_NAME", "attention", "packed_attention", "resolve_attention"]

CUDNN_TYPES = ("bfloat16", "float16")
CUDNN_HEAD = 128  # most values of a head that cuDNN takes on every GPU from Ampere on


def attention(
    q: Float[Array, "b t h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    bias: Float[Array, "#b #h t s"] | None = None,
    mask: Bool[Array, "#b #h #t s"] | None = None,
    *,
    implementation: str = "xla",
) -> Float[Array, "b t h d"]:
    """Computes attention.

    Args:
      q, k, v: queries, keys and values.
      bias: is added to the scaled scores.
      mask: which keys a query sees. One that sees none has no meaningful gradient.
      implementation: a name in NAMES. cudnn, head_by_head and heads_first have no
        forward-mode derivative.

    Returns:
      The weighted values, in the type of q.

    Raises:
      UserError: there is no such implementation, or it does not run here.
    """
    name = choose_attention(
        implementation, q.dtype, q.shape[-1], has_bias=bias is not None
    )
    return IMPLEMENTATIONS[name](q, k, v, bias, mask)


def packed_attention(
    qkv: Float[Array, "b t 3 h d"],
    bias: Float[Array, "#b #h t t"] | None = None,
    mask: Bool[Array, "#b #h #t t"] | None = None,
    *,
    implementation: str = "xla",
) -> Float[Array, "b t h d"]:
    """Computes attention of q, k and v that lie in one array, as a layer returns them.

    Args and Raises are those of attention().
    """
    b, t, _, h, d = qkv.shape
    name = choose_attention(implementation, qkv.dtype, d, has_bias=bias is not None)
    if name == "head_by_head" and is_worth_a_loop((b, t, h, d), num_keys=t):
        return head_by_head_packed((shard_batch(qkv),), bias, mask)
    # by split, whose gradient is one array put together and not the sum of three
    parts = (part.squeeze(2) for part in jnp.split(qkv, 3, axis=2))
    q, k, v = (shard_batch(part, None, HEADS) for part in parts)
    return IMPLEMENTATIONS[name](q, k, v, bias, mask)


xla = partial(jax.nn.dot_product_attention, implementation="xla")
# one fused kernel, whose scores never reach the memory
cudnn = partial(jax.nn.dot_product_attention, implementation="cudnn")
IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {
    "xla": xla,
    "cudnn": cudnn,
    "head_by_head": head_by_head,
    "heads_first": heads_first,
}
NAMES = ("auto", *IMPLEMENTATIONS)


def choose_attention(
    name: str,
    dtype: Dtype,
    head_width: int,
    *,
    has_bias: bool,
    platform: str | None = None,
) -> str:
    """Returns the name in IMPLEMENTATIONS that a name in NAMES stands for.

    Args:
      name: one of NAMES; "auto" takes what was measured to be quickest.
      dtype: of the products.
      head_width: values of a head.
      has_bias: whether scores get a bias, whose gradient cuDNN lacks for some shapes.
      platform: where it will run; by default this process's.

    Raises:
      UserError: an unknown name, or "cudnn" where it cannot run.
    """
    platform = platform or jax.default_backend()
    if name not in NAMES:
        raise UserError(f"attention is {name!r}: choose one of {', '.join(NAMES)}")
    has_cudnn = (
        platform in ("gpu", "cuda")
        and jnp.dtype(dtype).name in CUDNN_TYPES
        and head_width % 8 == 0
        and head_width <= CUDNN_HEAD
        and not has_bias
    )
    if name == "cudnn" and not has_cudnn:
        kind = "a bias" if has_bias else "none"
        raise UserError(
            "attention is 'cudnn', which needs a GPU, bfloat16, heads of a multiple of "
            f"8 and at most {CUDNN_HEAD} values and no bias; here are {platform}, "
            f"{jnp.dtype(dtype).name}, {head_width} and {kind}: choose auto"
        )
    if name != "auto":
        return name
    if platform == "cpu":
        return "head_by_head"
    if (
        platform == "tpu"
    ):  # with a bias the loop takes more cycles: docs/evidence/tpu.md
        return "xla" if has_bias else "heads_first"
    return "cudnn" if has_cudnn else "xla"


def attention_name(model: Any, platform: str | None = None) -> str:
    """Returns the name in IMPLEMENTATIONS that a DiT, SiT or MDT will use."""
    return choose_attention(
        model.attention,
        jnp.dtype(model.dtype),
        model.width // model.heads,
        has_bias=model.has_attention_bias,
        platform=platform,
    )


def resolve_attention(model: Any, platform: str | None = None) -> Any:
    """Returns the model with its attention named, for a platform that may be absent."""
    return dataclasses.replace(model, attention=attention_name(model, platform))
