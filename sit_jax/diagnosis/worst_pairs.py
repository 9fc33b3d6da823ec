"""The pairs of pictures that differ most, of two sets of the same noise and labels."""

import numpy as np

from sit_jax.errors import UserError

WORST = 8  # pairs in the picture


def worst_pairs(a, b, count=WORST):
    """Image sets of one length -> (numbers, uint8 [3 * n, H, W, 3]: A, B, difference).

    By the root mean square of a pair's difference, which is stretched to be seen.
    """
    if len(a) != len(b) or a.shape != b.shape:
        raise UserError(
            f"{len(a)} images {a.shape} and {len(b)} {b.shape} are no pairs"
        )
    kept = []
    start = 0
    for one, other in zip(a.batches(256), b.batches(256), strict=True):
        gap = (one.astype(np.int16) - other).astype(np.float32)
        size = np.sqrt((gap**2).mean((1, 2, 3)))
        rows = np.argsort(-size)[:count]
        kept += [(float(size[i]), start + int(i), one[i], other[i]) for i in rows]
        kept = sorted(kept, key=lambda row: (-row[0], row[1]))[:count]
        start += len(one)
    gaps = [np.abs(x.astype(np.int16) - y) for _, _, x, y in kept]
    largest = max(int(g.max()) for g in gaps) or 1
    tiles = []
    for (_, _, one, other), gap in zip(kept, gaps, strict=True):
        tiles += [one, other, np.rint(gap * (255 / largest)).astype(np.uint8)]
    return [(number, size) for size, number, _, _ in kept], np.stack(tiles)
