"""Attention of one head after another, whose scores a CPU's cache holds.

Backward they are computed again: reading them from memory would take longer.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

KEPT = "attended"  # the name of attention's results to policies of remat
LEAST = -0.7 * float(jnp.finfo(jnp.float32).max)  # the score of what is not seen


@jax.custom_vjp
def attend(*parts):
    """q [heads, B, T, D], k, v [heads, B, S, D], bias, mask [heads, ..] -> like q."""
    return _forward(*parts)[0]


def _forward(*parts):
    """-> results, and what the backward pass needs: no scores, but how to scale them.

    exp(score - log_sum) is a weight, log_sum [heads, B, T, 1]; as FlashAttention does,
    arXiv:2205.14135.
    """

    def one(part):
        q, k, v, bias, mask = part
        scores = _scores(q, k, bias, mask)
        most = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - most)
        total = weights.sum(-1, keepdims=True)
        out = _product(weights.astype(v.dtype), v) / total
        return out.astype(q.dtype), most + jnp.log(total)

    found = jax.lax.map(one, parts)
    out, log_sum = (checkpoint_name(x, KEPT) for x in found)
    return out, (*parts, out, log_sum)


def _backward(kept, slope):
    """-> gradients. The scores are transposed, so that only one product need be."""

    def one(part):
        q, k, v, bias, mask, out, log_sum, slope = part
        turned = lambda x: None if x is None else x.mT
        scores = _scores(k, q, turned(bias), turned(mask))
        weights = jnp.exp(scores - log_sum.mT)
        mean = jnp.sum(slope.astype(log_sum.dtype) * out, -1)[:, None]
        of_scores = weights * (_product(v, slope.mT) - mean)
        of_bias = None if bias is None else _like(of_scores.mT, bias)
        scaled = (of_scores * _scale(q)).astype(q.dtype)
        of_q, of_k = _product(scaled.mT, k), _product(scaled, q)
        of_v = _product(weights.astype(v.dtype), slope)
        return *(_like(*pair) for pair in ((of_q, q), (of_k, k), (of_v, v))), of_bias

    return *jax.lax.map(one, (*kept, slope)), None


attend.defvjp(_forward, _backward)


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


def _like(x, of):
    """x summed over the batch if `of` has one row, in its type."""
    if len(of) < len(x):  # as a product, for XLA sums by rows slowly on a CPU
        x = jnp.tensordot(jnp.ones((1, len(x)), x.dtype), x, 1, precision="highest")
    return x.astype(of.dtype)
