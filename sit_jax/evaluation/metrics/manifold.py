"""Precision and recall by nearest neighbours, as ADM's evaluator computes them.

Kynkaanniemi et al. arXiv:1904.06991: around each feature lies a ball that reaches its
third neighbour. Precision is the share of samples inside a ball of the reference,
recall the share of the reference inside a ball of the samples. Distances are squared
and float32. ADM's are float16 where that does not overflow, which nobody can reproduce
bit by bit: on recorded features it moved one sample of 360 across a border.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sit_jax.errors import UserError

NEIGHBOURS = 3
BLOCK = 4096  # features at most on a side of a block of distances: 64 MiB


def precision_recall(samples, reference, progress=iter):
    """Features [N, D] and [M, D] -> precision, recall.

    The sizes matter: published figures have N = 50,000 and M = 10,000. progress wraps
    each of three lists of blocks, for a bar.
    """
    both = (samples, reference)
    sizes = [_even(len(each), BLOCK) for each in both]
    reach = [radii(each, progress, BLOCK) for each in both]
    ours, theirs = (_blocks(*each) for each in zip(both, sizes, reach, strict=True))
    inside = [
        np.zeros((len(blocks), size), bool)
        for blocks, size in zip((ours, theirs), sizes, strict=True)
    ]
    pairs = [(i, j) for i in range(len(ours)) for j in range(len(theirs))]
    for i, j in progress(pairs):
        found = _covered(ours[i], theirs[j])
        inside[0][i] |= np.asarray(found[0])
        inside[1][j] |= np.asarray(found[1])
    counts = (each.sum() for each in inside)  # what fills up a block is never inside
    return tuple(
        float(count / len(each))
        for count, each in zip(counts, (samples, reference), strict=True)
    )


def radii(features, progress=iter, size=BLOCK):
    """features [N, D] -> squared distances [N] to the third nearest of the others.

    That is the fourth smallest entry of a row of distances that includes the feature
    itself. Distances are symmetric: each pair of blocks is computed once.
    """
    if len(features) <= NEIGHBOURS:
        raise UserError(
            f"precision and recall need more than {NEIGHBOURS} features on both sides, "
            f"there are {len(features)}"
        )
    blocks = _blocks(features, _even(len(features), size))
    best = [None] * len(blocks)
    pairs = [(i, j) for i in range(len(blocks)) for j in range(i, len(blocks))]
    for i, j in progress(pairs):
        rows, columns = map(np.asarray, _nearest(blocks[i], blocks[j]))
        best[i] = _smallest(best[i], rows)
        if i != j:
            best[j] = _smallest(best[j], columns)
    return np.concatenate([each.max(1) for each in best])[: len(features)]


def _even(count, most):
    """-> the size of the fewest blocks of at most `most` that hold `count`, all alike.

    Of 10,000 in blocks of 4096, a fifth of what is computed would be filling.
    """
    return -(-count // -(-count // most))


def _smallest(best, found):
    """The fewest of both [n, 4], in any order."""
    if best is None:
        return found
    both = np.concatenate([best, found], 1)
    return np.partition(both, NEIGHBOURS, axis=1)[:, : NEIGHBOURS + 1]


def _blocks(features, size, reach=None):
    """-> [(features [size, D], squared norms [size], radii [size]), ...] on a device.

    The last one is filled up with features that are infinitely far from everything.
    """
    blocks = []
    for start in range(0, len(features), size):
        part = np.asarray(features[start : start + size], np.float32)
        fill = (0, size - len(part))
        norms = np.pad(np.square(part).sum(1), fill, constant_values=np.inf)
        near = np.zeros(len(part)) if reach is None else reach[start : start + size]
        near = np.pad(near.astype(np.float32), fill, constant_values=-1)
        block = (np.pad(part, (fill, (0, 0))), norms, near)
        blocks.append(jax.device_put(block))
    return blocks


def _distances(a, b):
    products = jnp.dot(a[0], b[0].T, precision=lax.Precision.HIGHEST)
    return jnp.maximum(a[1][:, None] - 2 * products + b[1][None, :], 0)


@jax.jit
def _nearest(a, b):
    distances = _distances(a, b)
    least = lambda d: -lax.top_k(-d, NEIGHBOURS + 1)[0]
    return least(distances), least(distances.T)


@jax.jit
def _covered(a, b):
    distances = _distances(a, b)
    by_b, by_a = distances <= b[2][None, :], distances <= a[2][:, None]
    return by_b.any(1), by_a.any(0)
