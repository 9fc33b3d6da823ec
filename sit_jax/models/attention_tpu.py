"""Attention in the layout that suits a TPU.

With the tokens last, heads of 72 values fill a TPU's tiles of 8 x 128 and are copied
into no other layout; the scores of the heads of one turn stay in the chip's fast
memory. It saves 15 to 40 % of the cycles of attention (docs/evidence/tpu.md) and is
used where model.attention is auto or heads_first; model.attention=xla turns it off.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from sit_jax.models.attention_cpu import MASKED_SCORE, SAVED_NAME, matmul_precision
from sit_jax.parallel.mesh import BATCH, HEADS, shard_heads

# Bytes of scores of the heads that are computed together; a v4 has more fast memory.
SCORES_PER_TURN = 2**24
SCORES_PER_TURN_OF = {"TPU v4": 2**26}


def heads_first(q, k, v, bias=None, mask=None):
    """Computes attention.attention's q, k, v in the layout of heads_first_attention."""
    q, k, v = (shard_heads(rearrange(x, "b t h d -> h b d t")) for x in (q, k, v))
    out = heads_first_attention(q, k, v, bias, mask)
    return rearrange(out, "h b d t -> b t h d")


def heads_first_attention(
    q: Float[Array, "h b d t"],
    k: Float[Array, "h b d s"],
    v: Float[Array, "h b d s"],
    bias: Float[Array, "#b #h t s"] | None = None,
    mask: Bool[Array, "#b #h #t s"] | None = None,
) -> Float[Array, "h b d t"]:
    """Computes attention, some heads after others where their scores are large.

    It has no forward-mode derivative where there is such a loop. The backward pass
    computes the scores again, from what is kept under SAVED_NAME.
    """
    parts = {"q": q, "k": k, "v": v}
    if bias is not None:
        bias = jnp.moveaxis(bias, 1, 0)
        parts["bias"] = jnp.broadcast_to(bias, (len(q), *bias.shape[1:]))
    common_mask, masks = {}, {}
    if mask is not None and mask.shape[1] > 1:
        masks["mask"] = jnp.moveaxis(mask, 1, 0)
    elif mask is not None:
        common_mask["mask"] = mask[:, 0]
    per_turn = heads_per_turn(q, k)
    heads_are_split = jax.sharding.get_abstract_mesh().shape.get(HEADS, 1) > 1
    if per_turn == len(q) or heads_are_split:
        out = jax.vmap(lambda *head: _one_head(*head, common_mask))(parts, masks)
    else:
        out = _map_heads(_one_head, per_turn, parts, masks, common_mask)
    return checkpoint_name(out, SAVED_NAME)


@jax.checkpoint
def _one_head(parts, mask, common_mask):
    """q [b, d, t], k, v [b, d, s], bias [b or 1, t, s] of a head -> like q."""
    q, k, v = (parts[name] for name in "qkv")
    # as jax.nn does: else the scores' gradient, float32, would be multiplied as such
    is_half = q.dtype == jnp.bfloat16
    precision = jax.lax.DotAlgorithmPreset.BF16_BF16_F32 if is_half else None
    scores = jnp.einsum(
        "bdt,bds->bts", q, k, precision=precision, preferred_element_type=jnp.float32
    )
    scores = scores / math.sqrt(q.shape[1])
    if "bias" in parts:
        scores = scores + parts["bias"]
    for seen in (mask | common_mask).values():
        scores = jnp.where(seen, scores, MASKED_SCORE)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bts,bds->bdt", weights, v)


def heads_per_turn(q: Float[Array, "h b d t"], k: Float[Array, "h b d s"]) -> int:
    """Returns how many heads are computed together: a divisor of their number.

    Where the scores of all are small, a loop costs more than it saves. Else the scores
    of a turn and their gradients are to stay in the chip's fast memory.
    """
    h, b, _, t = q.shape
    mesh = jax.sharding.get_abstract_mesh()
    num_shards = math.prod(mesh.shape.get(axis, 1) for axis in BATCH)
    size = 4 * t * k.shape[-1] * -(-b // num_shards)  # bytes of a head's scores
    device = mesh.abstract_device
    kind = device.device_kind if device else "none"
    most = SCORES_PER_TURN_OF.get(kind, SCORES_PER_TURN)
    if h * size <= 2 * most:
        return h
    fitting = (n for n in range(1, h + 1) if h % n == 0 and n * size <= most)
    return max(fitting, default=1)


def _map_heads(fn: Callable, per_turn: int, parts: Any, masks: Any, common: Any) -> Any:
    """Returns fn(parts, mask, common) of every head, `per_turn` heads at a time.

    Only parts have gradients. They are written over the parts: jax.lax.map would begin
    them as arrays of zeros, which a TPU takes as long to clear as a tenth of attention.
    """
    return _mapped(fn, per_turn, matmul_precision(), parts, masks, common)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _mapped(fn, per_turn, precision, parts, masks, common):
    return _map_forward(fn, per_turn, precision, parts, masks, common)[0]


def _map_forward(fn, per_turn, precision, parts, masks, common):
    head = lambda row: fn(*row, common)
    out = jax.lax.map(head, (parts, masks), batch_size=per_turn)
    return out, (parts, masks, common)


def _map_backward(fn, per_turn, precision, residuals, grads):
    parts, masks, common = residuals
    split = lambda x: x.reshape(-1, per_turn, *x.shape[1:])
    parts, masks, grads = jax.tree.map(split, (parts, masks, grads))

    def turn(parts, inputs):
        i, masks, grads = inputs
        read = lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
        heads = jax.vmap(lambda part, mask: fn(part, mask, common))
        with jax.default_matmul_precision(precision):
            rows = jax.tree.map(read, parts)
            _, pull_back = jax.vjp(lambda rows: heads(rows, masks), rows)
            (grads,) = pull_back(grads)
        write = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0)
        return jax.tree.map(write, parts, grads), None

    numbers = jnp.arange(len(grads), dtype="uint32")
    parts, _ = jax.lax.scan(turn, parts, (numbers, masks, grads))
    join = lambda x: x.reshape(-1, *x.shape[2:])
    return jax.tree.map(join, parts), None, None


_mapped.defvjp(_map_forward, _map_backward)
