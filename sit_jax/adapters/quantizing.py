"""Checkpoints of quantized weights: made a stack of layers at a time, and read back.

What a step holds is the item "ema" with codes and scales in place of matrices; its meta
says in which form ("quantized"), and from which weights.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sit_jax import checkpoint
from sit_jax.adapters.quantized import require_finite, storing
from sit_jax.adapters.stored import is_stored, read
from sit_jax.errors import UserError


def quantized(params, word, skip):
    """-> the tree with its matrices stored as the word says."""
    store = storing(word, skip)
    flat = flatten_dict(params, sep="/")
    for path, leaf in flat.items():
        if is_stored(leaf):
            raise UserError(f"{path} is in another form already, not floats: no {word}")
        require_finite(path, leaf)
    return _nested({path: store(path, leaf) for path, leaf in flat.items()}, word, skip)


def shapes(like, meta):
    """like: shapes of plain params -> of those that a step with this meta holds."""
    form = meta.get("quantized")
    if form is None:
        return like
    store = storing(form["form"], form["skip"])
    flat = flatten_dict(like, sep="/")
    return unflatten_dict(
        {
            path: jax.eval_shape(lambda w, path=path: store(path, w), leaf)
            for path, leaf in flat.items()
        },
        sep="/",
    )


def converted(leaves, word, skip, total=None):
    """(path, float array) one after the other -> the tree, and a row on each stack.

    Only one float leaf is held at a time, and no second one of its size is made. A row:
    path, floats' bytes, bytes, relative L2 error of the weights, 0 of those that stay.
    total: how many there will be.
    """
    from tqdm import tqdm

    store, flat, rows = storing(word, skip), {}, []
    for path, leaf in tqdm(leaves, total=total, unit="weight", disable=None):
        flat[path] = jax.block_until_ready(_by_layers(store, path, leaf))
        error = _error(flat[path], leaf) if is_stored(flat[path]) else 0.0
        rows.append((path, leaf.nbytes, size(flat[path]), error))
    return _nested(flat, word, skip), sorted(rows)


def size(tree):
    """Bytes of all arrays in a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def save(directory, step, params, meta, word, skip):
    """Writes the step of a checkpoint directory."""
    saved = checkpoint.Checkpoints(directory, items={"ema": params})
    saved.save(step, {**meta, "quantized": {"form": word, "skip": skip}}, ema=params)
    saved.close()


def _by_layers(store, path, leaf):
    """store(path, leaf), a layer of a stack at a time; refuses what is not finite."""

    def one(weight):
        require_finite(path, weight)
        return store(path, jnp.asarray(weight))

    if leaf.ndim < 3:
        return one(leaf)
    return jax.tree.map(lambda *layers: np.stack(layers), *map(one, leaf))


def _error(stored, leaf, most=2**24):
    """Of whole layers, a few at a time: the floats must not all come back."""
    each = max(1, most // max(1, leaf[0].size)) if leaf.ndim > 2 else 1
    parts = range(0, len(leaf), each) if leaf.ndim > 2 else [slice(None)]
    off = whole = 0.0
    for at in parts:
        rows = slice(at, at + each) if leaf.ndim > 2 else at
        ours = read(jax.tree.map(lambda x, rows=rows: x[rows], stored))
        theirs = np.asarray(leaf[rows], np.float64)
        off += float(np.sum((np.asarray(ours, np.float64) - theirs) ** 2))
        whole += float(np.sum(theirs**2))
    return (off / whole) ** 0.5 if whole else 0.0


def _nested(flat, word, skip):
    if not any(map(is_stored, flat.values())):
        raise UserError(f"{skip!r} spares every weight: nothing becomes {word}")
    return unflatten_dict(flat, sep="/")
