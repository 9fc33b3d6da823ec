"""A function of one after another of what is stacked, its gradients written in place.

jax.lax.map begins its gradients as arrays of zeros, which a TPU takes as long to clear
as a tenth of attention.
"""

from functools import partial

import jax


def in_turns(one, many, parts, own, shared):
    """one(part, own, shared) of every row of the trees parts and own, `many` a turn.

    Only parts have gradients. No forward-mode derivative.
    """
    # a custom vjp would not inherit it
    precision = jax.config.jax_default_matmul_precision
    return _in_turns(one, many, precision, parts, own, shared)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _in_turns(one, many, precision, parts, own, shared):
    return _forward(one, many, precision, parts, own, shared)[0]


def _forward(one, many, precision, parts, own, shared):
    each = lambda row: one(*row, shared)
    found = jax.lax.map(each, (parts, own), batch_size=many)
    return found, (parts, own, shared)


def _backward(one, many, precision, kept, slope):
    parts, own, shared = kept
    split = lambda x: x.reshape(-1, many, *x.shape[1:])
    parts, own, slope = jax.tree.map(split, (parts, own, slope))

    def turn(parts, at):
        i, own, slope = at
        row = lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)
        each = jax.vmap(lambda part, own: one(part, own, shared))
        with jax.default_matmul_precision(precision):
            _, back = jax.vjp(lambda rows: each(rows, own), jax.tree.map(row, parts))
            slopes = back(slope)
        put = lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0)
        return jax.tree.map(put, parts, *slopes), None

    numbers = jax.numpy.arange(len(slope), dtype="uint32")
    parts, _ = jax.lax.scan(turn, parts, (numbers, own, slope))
    join = lambda x: x.reshape(-1, *x.shape[2:])
    return jax.tree.map(join, parts), None, None


_in_turns.defvjp(_forward, _backward)
