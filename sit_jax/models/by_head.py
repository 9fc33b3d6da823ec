"""Attention of one head after another, whose scores a CPU's cache holds.

Backward they are computed again: reading them from memory would take longer. Heads are
read from where a layer left them and written to where the next one wants them, so that
nothing is put in another order before or after.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KEPT = "attended"  # what policies of remat know attention's qkv and results by
LEAST = -0.7 * float(jnp.finfo(jnp.float32).max)  # the score of what is not seen


def attend(qkv, bias, mask):
    """-> [B, T, heads, D]

    qkv: ([B, T, 3, heads, D],) or three arrays, q [B, T, 1, heads, D], k and v [B, S,
    ...]. bias [B or 1, heads or 1, T, S] or None, mask [B or 1, heads or 1, T or 1, S]
    too. No forward-mode derivative.
    """
    if bias is not None:  # its gradient is written over it, head by head
        heads, keys = qkv[0].shape[3], qkv[-1].shape[1]
        bias = jnp.broadcast_to(bias, (len(bias), heads, qkv[0].shape[1], keys))
    # a custom vjp would not inherit it
    return _attend(jax.config.jax_default_matmul_precision, qkv, bias, mask)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(precision, qkv, bias, mask):
    return _forward(precision, qkv, bias, mask)[0]


def _forward(precision, qkv, bias, mask):
    """-> results, and what the backward pass needs: no scores, but how to scale them.

    exp(score - log_sum) is a weight, log_sum [heads, B, T, 1]; as FlashAttention does,
    arXiv:2205.14135.
    """

    def one(found, i):
        out, log_sum = found
        q, k, v = (_read(qkv, n, i) for n in range(3))
        scores = _scores(q, k, _head(bias, i), _head(mask, i))
        most = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - most)
        total = weights.sum(-1, keepdims=True)
        rows = (_product(weights.astype(v.dtype), v) / total).astype(out.dtype)
        out = jax.lax.dynamic_update_index_in_dim(out, rows, i, 2)
        its_sum = most + jnp.log(total)
        log_sum = jax.lax.dynamic_update_index_in_dim(log_sum, its_sum, i, 0)
        return (out, log_sum), None

    rows, length, _, heads, _ = qkv[0].shape
    out = jnp.zeros_like(qkv[0][:, :, 0])
    kind = jnp.promote_types(out.dtype, "float32")
    found = (out, jnp.zeros((heads, rows, length, 1), kind))
    found, _ = jax.lax.scan(one, found, _numbers(heads))
    out, log_sum = (checkpoint_name(x, KEPT) for x in found)
    return out, (qkv, bias, mask, out, log_sum)


def _backward(precision, kept, slope):
    """-> gradients, each written over what it is of, so that nothing is cleared first.

    The scores are transposed, so that only one product need be.
    """
    qkv, bias, mask, out, log_sum = kept
    shared = bias is not None and len(bias) == 1  # by the whole batch

    def one(found, i):
        qkv, bias = found
        q, k, v = (_read(qkv, n, i) for n in range(3))
        rows, its_slope = _head(out, i, 2), _head(slope, i, 2)
        its_bias = _head(bias, i) if shared else _turned(_head(bias, i))
        scores = _scores(k, q, its_bias, _turned(_head(mask, i)))
        weights = jnp.exp(scores - _head(log_sum, i, 0).mT)
        mean = jnp.sum(its_slope.astype(log_sum.dtype) * rows, -1)[:, None]
        of_scores = weights * (_product(v, its_slope.mT) - mean)
        scaled = (of_scores * _scale(q)).astype(q.dtype)
        of_v = _product(weights.astype(v.dtype), its_slope)
        slopes = _product(scaled.mT, k), _product(scaled, q), of_v
        if bias is not None:
            of_bias = _over_batch(of_scores) if shared else of_scores.mT
            of_bias = of_bias.astype(bias.dtype)
            bias = jax.lax.dynamic_update_index_in_dim(bias, of_bias, i, 1)
        return (_written(qkv, slopes, i), bias), None

    begun = (qkv, bias.mT if shared else bias)
    with jax.default_matmul_precision(precision):
        (qkv, bias), _ = jax.lax.scan(one, begun, _numbers(out.shape[2]))
    return qkv, bias.mT if shared else bias, None


_attend.defvjp(_forward, _backward)


def _numbers(heads):
    return jnp.arange(heads, dtype=jnp.uint32)  # none can be negative, which is checked


def _read(qkv, n, i):
    """Head i of q, k or v, n being 0, 1 or 2: [B, T, D]."""
    which, start = _place(qkv, n, i)
    x = qkv[which]
    sizes = (*x.shape[:2], 1, 1, x.shape[4])
    return jax.lax.dynamic_slice(x, start, sizes)[:, :, 0, 0]


def _place(qkv, n, i):
    """-> which array of qkv head i of q, k or v is in, and where it begins there."""
    which, row = (0, n) if len(qkv) == 1 else (n, 0)
    return which, [*(jnp.uint32(at) for at in (0, 0, row)), i, jnp.uint32(0)]


def _written(qkv, parts, i):
    """qkv with head i of q, k and v replaced."""
    qkv = list(qkv)
    for n, part in enumerate(parts):
        which, start = _place(qkv, n, i)
        part = part[:, :, None, None].astype(qkv[which].dtype)
        qkv[which] = jax.lax.dynamic_update_slice(qkv[which], part, start)
    return tuple(qkv)


def _head(x, i, axis=1):
    """Number i of x along its axis of heads, or the one for all; None of None."""
    if x is None:
        return None
    i = 0 if x.shape[axis] == 1 else i
    return jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False)


def _turned(x):
    return None if x is None else x.mT


def _scores(q, k, bias, mask):
    """q [B, T, D], k [B, S, D] of a head -> float32 [B, T, S]"""
    scores = _product(q, k.mT) * _scale(q)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, LEAST)
    return scores


def _product(a, b):
    """Summed in float32 at least."""
    return jnp.matmul(
        a, b, preferred_element_type=jnp.promote_types(a.dtype, "float32")
    )


def _scale(q):
    return q.shape[-1] ** -0.5


def _over_batch(x):
    """[B, ...] -> [1, ...]; as a product, for XLA sums by rows slowly on a CPU."""
    ones = jnp.ones((1, len(x)), x.dtype)
    return jnp.tensordot(ones, x, 1, precision="highest")
