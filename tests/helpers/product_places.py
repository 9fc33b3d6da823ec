"""Products of two arrays wherever a program may hold them."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from sit_jax.parallel.mesh import make_mesh


@jax.custom_jvp
def ruled_forward(x, w):
    return x @ w


@ruled_forward.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, dx @ w + x @ dw


@jax.custom_vjp
def ruled_backward(x, w):
    return x @ w


ruled_backward.defvjp(
    lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g)
)


def scanned(x, w):
    return jax.lax.scan(lambda s, row: (s, row @ w), 0.0, x)[1]


def looped(x, w):
    body = lambda i, out: out.at[i].set(x[i] @ w)
    return jax.lax.fori_loop(0, len(x), body, jnp.zeros((len(x), w.shape[1])))


def branched(x, w):
    return jax.lax.cond(x[0, 0] > 99, lambda: x, lambda: x @ w)


def sharded(x, w):
    batch, mesh = PartitionSpec("fsdp"), make_mesh()
    part = lambda x, w: jax.lax.psum(x, ()) @ w
    specs = dict(in_specs=(batch, PartitionSpec()), out_specs=batch)
    return jax.shard_map(part, mesh=mesh, **specs)(x, w)


# all of them x @ w
PLACES = {
    "plain": jnp.dot,
    "jit": jax.jit(jnp.dot),
    "nested jit": jax.jit(lambda x, w: jax.jit(jnp.dot)(x, w)),
    "scan": scanned,
    "while": looped,
    "cond": branched,
    "map": lambda x, w: jax.lax.map(lambda row: row @ w, x),
    "remat": jax.checkpoint(jnp.dot),
    "vmap": jax.vmap(jnp.dot, (0, None)),
    "custom_jvp": ruled_forward,
    "custom_vjp": ruled_backward,
    "shard_map": sharded,
    "linear solve": lambda x, w: jax.lax.custom_linear_solve(  # programs in a tuple
        lambda v: v, x, lambda _, b: b @ w
    ),
}
