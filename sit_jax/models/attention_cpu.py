"""Attention and products of training that XLA computes quickly on a CPU.

1. Attention of one head after another, whose scores a CPU's cache holds. The backward
   pass computes them again: reading them from memory would take longer. Heads are read
   from where a layer left them and written to where the next one wants them, so that
   nothing is put in another order before or after. model.attention=xla turns it off.
2. training_product, whose weight gradient is a product without a transposed operand.

With both a training step of SiT-S/2 takes 0.85 of the steps of torch.compile on the
same cores; see docs/evidence/performance.md for what each of them saves.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from sit_jax.parallel.mesh import HEADS

CACHE = 2**22  # bytes of scores from which one head is taken at a time
SAVED_NAME = "attention"  # by which policies of remat know qkv and attention's results
MASKED_SCORE = -0.7 * float(jnp.finfo(jnp.float32).max)


def is_worth_a_loop(shape: tuple[int, int, int, int], num_keys: int) -> bool:
    """Returns whether heads are taken one by one, for q of a shape (b, t, h, d).

    Heads that are split over devices are left in one piece.
    """
    b, t, h, _ = shape
    heads_are_split = jax.sharding.get_abstract_mesh().shape.get(HEADS, 1) > 1
    return b * h * t * num_keys * 4 > CACHE and h > 1 and not heads_are_split


def head_by_head(q, k, v, bias=None, mask=None):
    """Computes attention.attention's q, k, v, by a loop over heads if that is quicker.

    Heads and not images take turns, since a batch may be split over devices.
    """
    if not is_worth_a_loop(q.shape, k.shape[1]):
        return jax.nn.dot_product_attention(q, k, v, bias, mask, implementation="xla")
    return head_by_head_packed(tuple(x[:, :, None] for x in (q, k, v)), bias, mask)


def head_by_head_packed(
    qkv: tuple[Array, ...],
    bias: Float[Array, "#b #h t s"] | None,
    mask: Bool[Array, "#b #h #t s"] | None,
) -> Float[Array, "b t h d"]:
    """Computes attention head by head; it has no forward-mode derivative.

    Args:
      qkv: one array [b, t, 3, h, d], or q [b, t, 1, h, d] and k and v [b, s, 1, h, d].
      bias, mask: as in attention.attention.
    """
    if bias is not None:  # its gradient is written over it, head by head
        heads, num_keys = qkv[0].shape[3], qkv[-1].shape[1]
        bias = jnp.broadcast_to(bias, (len(bias), heads, qkv[0].shape[1], num_keys))
    return _attention(matmul_precision(), qkv, bias, mask)


def matmul_precision() -> str | None:
    """Returns the precision in force, which a custom vjp would not inherit."""
    config: Any = jax.config
    return config.jax_default_matmul_precision


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(precision, qkv, bias, mask):
    return _attention_forward(precision, qkv, bias, mask)[0]


def _attention_forward(precision, qkv, bias, mask):
    """Returns the results, and what the backward pass needs.

    That is no scores, but log_sum [h, b, t, 1], with which exp(score - log_sum) is a
    weight, as in FlashAttention, arXiv:2205.14135.
    """

    def one_head(carry, i):
        out, log_sums = carry
        q, k, v = (_read_part(qkv, n, i) for n in range(3))
        scores = _scores(q, k, _head(bias, i), _head(mask, i))  # (b, t, s)
        largest = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True)
        rows = (_matmul(weights.astype(v.dtype), v) / total).astype(out.dtype)
        out = jax.lax.dynamic_update_index_in_dim(out, rows, i, 2)
        log_sum = largest + jnp.log(total)
        log_sums = jax.lax.dynamic_update_index_in_dim(log_sums, log_sum, i, 0)
        return (out, log_sums), None

    b, t, _, h, _ = qkv[0].shape
    out = jnp.zeros_like(qkv[0][:, :, 0])
    dtype = jnp.promote_types(out.dtype, "float32")
    carry = (out, jnp.zeros((h, b, t, 1), dtype))
    carry, _ = jax.lax.scan(one_head, carry, _head_numbers(h))
    out, log_sums = (checkpoint_name(x, SAVED_NAME) for x in carry)
    return out, (qkv, bias, mask, out, log_sums)


def _attention_backward(precision, residuals, grad):
    """Returns gradients, each written over its array, so that nothing is cleared first.

    The scores are transposed, [b, s, t], so that only one product need be.
    """
    qkv, bias, mask, out, log_sums = residuals
    is_common = bias is not None and len(bias) == 1  # one bias for the whole batch

    def one_head(carry, i):
        qkv, bias = carry
        q, k, v = (_read_part(qkv, n, i) for n in range(3))
        rows, row_grad = _head(out, i, 2), _head(grad, i, 2)
        head_bias = _head(bias, i) if is_common else _transpose(_head(bias, i))
        scores = _scores(k, q, head_bias, _transpose(_head(mask, i)))
        weights = jnp.exp(scores - _head(log_sums, i, 0).mT)
        mean = jnp.sum(row_grad.astype(log_sums.dtype) * rows, -1)[:, None]
        score_grad = weights * (_matmul(v, row_grad.mT) - mean)
        scaled = (score_grad * _scale(q)).astype(q.dtype)
        v_grad = _matmul(weights.astype(v.dtype), row_grad)
        grads = _matmul(scaled.mT, k), _matmul(scaled, q), v_grad
        if bias is not None:
            bias_grad = _sum_batch(score_grad) if is_common else score_grad.mT
            bias_grad = bias_grad.astype(bias.dtype)
            bias = jax.lax.dynamic_update_index_in_dim(bias, bias_grad, i, 1)
        return (_write_parts(qkv, grads, i), bias), None

    carry = (qkv, bias.mT if is_common else bias)
    with jax.default_matmul_precision(precision):
        (qkv, bias), _ = jax.lax.scan(one_head, carry, _head_numbers(out.shape[2]))
    return qkv, bias.mT if is_common else bias, None


_attention.defvjp(_attention_forward, _attention_backward)


def _head_numbers(heads):
    return jnp.arange(heads, dtype=jnp.uint32)  # none can be negative, which is checked


def _read_part(qkv, n, i):
    """Returns head i of q, k or v, n being 0, 1 or 2: [b, t, d]."""
    array, start = _find_part(qkv, n, i)
    x = qkv[array]
    sizes = (*x.shape[:2], 1, 1, x.shape[4])
    return jax.lax.dynamic_slice(x, start, sizes)[:, :, 0, 0]


def _find_part(qkv, n, i):
    """Returns which array of qkv has head i of q, k or v, and where it begins there."""
    array, row = (0, n) if len(qkv) == 1 else (n, 0)
    return array, [*(jnp.uint32(k) for k in (0, 0, row)), i, jnp.uint32(0)]


def _write_parts(qkv, parts, i):
    """Returns qkv with head i of q, k and v replaced."""
    qkv = list(qkv)
    for n, part in enumerate(parts):
        array, start = _find_part(qkv, n, i)
        part = part[:, :, None, None].astype(qkv[array].dtype)
        qkv[array] = jax.lax.dynamic_update_slice(qkv[array], part, start)
    return tuple(qkv)


def _head(x, i, axis=1):
    """Returns head i of x, or the one for all heads; None of None."""
    if x is None:
        return None
    i = 0 if x.shape[axis] == 1 else i
    return jax.lax.dynamic_index_in_dim(x, i, axis, keepdims=False)


def _transpose(x):
    return None if x is None else x.mT


def _scores(q, k, bias, mask):
    """Returns scores of a head in float32, [b, t, s], for q [b, t, d], k [b, s, d]."""
    scores = _matmul(q, k.mT) * _scale(q)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = jnp.where(mask, scores, MASKED_SCORE)
    return scores


def _matmul(a, b):
    """Multiplies and sums in float32 at least."""
    dtype = jnp.promote_types(a.dtype, "float32")
    return jnp.matmul(a, b, preferred_element_type=dtype)


def _scale(q):
    return q.shape[-1] ** -0.5


def _sum_batch(x):
    """Returns the sum over [b, ...] as [1, ...]; XLA sums rows slowly on a CPU."""
    ones = jnp.ones((1, len(x)), x.dtype)
    return jnp.tensordot(ones, x, 1, precision="highest")


def training_product(
    x: Float[Array, "*b in"], weight: Float[Array, "in out"]
) -> Float[Array, "*b out"]:
    """Multiplies x by a weight; it has no forward-mode derivative.

    The gradient of the weight is x' grad. JAX writes it as (grad' x)', for which XLA
    on a CPU transposes grad while computing it: in strides, from all its inputs. Other
    platforms get JAX's.
    """
    return _product(x, weight, matmul_precision())


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, weight, precision):
    return jnp.dot(x, weight, precision=precision)


def _product_forward(x, weight, precision):
    # not _product: a policy for recomputing would not see the dot in it
    return jnp.dot(x, weight, precision=precision), (x, weight)


def _product_backward(precision, residuals, grad):
    x, weight = residuals
    dot = functools.partial(jnp.dot, precision=precision)
    _, pull_back = jax.vjp(dot, x, weight)
    x_grad, _ = pull_back(grad)
    usual = lambda x, grad: pull_back(grad)[1]
    # either x or grad is transposed: x, unless it is far wider
    if weight.shape[0] > 2 * weight.shape[1]:
        return x_grad, usual(x, grad)

    def without_transpose(x, grad):
        axes = tuple(range(x.ndim - 1))
        dims = ((axes, axes), ((), ()))
        return jax.lax.dot_general(x, grad, dims, precision=precision)

    weight_grad = jax.lax.platform_dependent(
        x, grad, cpu=without_transpose, default=usual
    )
    return x_grad, weight_grad


_product.defvjp(_product_forward, _product_backward)
