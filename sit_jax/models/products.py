"""The product of training, whose weight's gradient is one that a CPU computes well."""

import functools

import jax
import jax.numpy as jnp


def product(x, weight):
    """x [..., in] times weight [in, out] -> [..., out]. No forward-mode derivative."""
    # a custom vjp would not inherit it
    return _product(x, weight, jax.config.jax_default_matmul_precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x, weight, precision):
    return jnp.dot(x, weight, precision=precision)


def _forward(x, weight, precision):
    # not _product: a policy for recomputing would not see the dot in it
    return jnp.dot(x, weight, precision=precision), (x, weight)


def _backward(precision, kept, slope):
    x, weight = kept
    dot = functools.partial(jnp.dot, precision=precision)
    _, as_usual = jax.vjp(dot, x, weight)
    of_x, _ = as_usual(slope)
    usual = lambda x, slope: as_usual(slope)[1]
    # either x or slope is transposed: x, unless it is far wider
    if weight.shape[0] > 2 * weight.shape[1]:
        return of_x, usual(x, slope)
    ours = functools.partial(_of_weight, precision)
    of_weight = jax.lax.platform_dependent(x, slope, cpu=ours, default=usual)
    return of_x, of_weight


_product.defvjp(_forward, _backward)


def _of_weight(precision, x, slope):
    """x' slope. JAX writes (slope' x)', for which XLA transposes slope on a CPU.

    It does so while computing it: in strides, from all that it is computed of.
    """
    axes = tuple(range(x.ndim - 1))
    dims = ((axes, axes), ((), ()))
    return jax.lax.dot_general(x, slope, dims, precision=precision)
