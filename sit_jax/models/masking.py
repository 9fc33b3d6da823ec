"""Hiding tokens: which ones, the others gathered, and all put back in place.

MDT, arXiv:2303.14389. A mask is the order in which tokens are seen, a permutation
drawn for every image, and how many of them are. Shapes stay static: as many tokens as
can ever be seen, M, are gathered; those that a smaller draw hides are among them, and
nobody attends to them. So that there are fewer of these, a program may have several M.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct


class Seen(struct.PyTreeNode):
    """The part of a batch's tokens that an encoder works on."""

    order: jax.Array  # int [B, M], the tokens gathered
    place: jax.Array  # int [B, T], of every token in the whole order
    valid: jax.Array | None  # bool [B, M]; None: all that were gathered are seen
    hidden: jax.Array  # bool [B, T]


def draw(key, batch, tokens, hide, spread):
    """-> {"order": int [B, T]}, with "kept" int [B] where the share is drawn too.

    The hidden share is hide + spread * U(0, 1), one draw for the batch (released: one
    for each GPU's part of it); rounding to tokens kept is as released, in float32.
    """
    key_order, key_share = jax.random.split(key)
    order = jnp.argsort(jax.random.uniform(key_order, (batch, tokens)), axis=1)
    if not spread:
        return {"order": order}
    share = hide + spread * jax.random.uniform(key_share)
    kept = jnp.floor(tokens * (1 - share)).astype(int)
    kept = jnp.minimum(kept, most(tokens, hide))  # which is not rounded in float32
    return {"order": order, "kept": jnp.full(batch, kept)}


def most(tokens, hide):
    """How many tokens the smallest share leaves."""
    return int(tokens * (1 - hide))


def sizes(tokens, hide, spread, count):
    """-> at most `count` numbers of tokens, evenly spaced, up to the most ever seen."""
    high, low = most(tokens, hide), most(tokens, hide + spread)
    return sorted({high - (high - low) * i // count for i in range(count)})


def seen(order, kept, size):
    """order int [B, T], kept int [B] or None for all of the first `size` -> Seen."""
    place = jnp.argsort(order, axis=1)
    number = jnp.full(len(order), size) if kept is None else kept
    valid = None if kept is None else jnp.arange(size)[None] < kept[:, None]
    return Seen(order[:, :size], place, valid, place >= number[:, None])


def take(x, seen):
    """x [B, T, D] -> the tokens gathered, [B, M, D]."""
    return jnp.take_along_axis(x, seen.order[..., None], axis=1)


def put_back(x, seen, token):
    """x [B, M, D], token [1, 1, D] for the hidden ones -> [B, T, D] in place."""
    place = jnp.minimum(seen.place, x.shape[1] - 1)  # where hidden, of any
    whole = jnp.take_along_axis(x, place[..., None], axis=1)
    return jnp.where(seen.hidden[..., None], token.astype(x.dtype), whole)


def among(bias, seen):
    """bias [heads, T, T] between all tokens -> [B, heads, M, M] between those seen."""
    pick = lambda order: bias[:, order[:, None], order[None]]
    return jax.vmap(pick)(seen.order)


def offsets(side):
    """Number of the relative position of every pair (query, key), int [T, T].

    As in BEiT (arXiv:2106.08254), whose table it points into has three rows more.
    """
    rows, columns = np.divmod(np.arange(side * side), side)
    down = rows[:, None] - rows[None] + side - 1
    across = columns[:, None] - columns[None] + side - 1
    return down * (2 * side - 1) + across
