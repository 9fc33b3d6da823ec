"""Two sets of samples of the same noises and labels: is the gap of their FIDs one?

Unpaired sets of 50,000 differ by some 0.05 of FID by their noise alone, so that a gap
of 0.09 says nothing. Resampling pairs leaves the common noise out of the gap; the noise
band says what sets of other seeds would have done.
"""

import dataclasses

import numpy as np

from sit_jax.errors import UserError
from sit_jax.metrics.gaussian import Gaussian, frechet

WIDE = 4.0  # standard deviations; 30 resamples give one to 13 %, and 8 % too small
WORST = 8  # pairs in the picture


@dataclasses.dataclass(frozen=True)
class Gap:
    """fids: of A and B to the reference; between: of A to B; band: noise of the gap.

    interval: 95 % of the gap over resampled pairs, None where there are no pairs.
    feature_gap: mean distance of a pair's features over their root mean square.
    """

    fids: tuple
    between: float
    interval: tuple | None
    band: float
    feature_gap: float | None
    seeds: int

    @property
    def gap(self):
        return self.fids[0] - self.fids[1]

    @property
    def within_noise(self):
        return bool(abs(self.gap) <= self.band)

    def sentence(self):
        a, b = self.fids
        said = (
            f"FID {a:.4g} and {b:.4g}, gap {self.gap:+.3g}, noise band {self.band:.3g}"
        )
        if self.interval is not None:
            low, high = self.interval
            said += f", paired 95 % interval {low:+.3g} to {high:+.3g}"
            if self.within_noise and low * high > 0:
                said += ": a real difference that unpaired sets would not show"
        return f"{'Within' if self.within_noise else 'Beyond'} noise: {said}."


def compare(a, b, reference, are_pairs, seeds=(), resamples=30, seed=0, progress=iter):
    """Features a [N, D], b [M, D] and a Gaussian -> Gap.

    seeds: FIDs of further sets that differ by seed only; with them the band is at least
    what they scatter by. are_pairs: row i of both began from the same noise and label.
    """
    if a.shape[1:] != b.shape[1:]:
        raise UserError(f"features are {a.shape[1]} numbers in A, {b.shape[1]} in B")
    if are_pairs and len(a) != len(b):
        raise UserError(f"{len(a)} and {len(b)} images are no pairs")
    if min(len(a), len(b)) < 2:
        raise UserError("a set of one image has no covariance")
    rng = np.random.default_rng(seed)
    gaussians = Gaussian.of(a), Gaussian.of(b)
    fids = tuple(distance(x, reference) for x in (a, b))
    together, apart = [], []
    far = lambda x, rows: frechet(Gaussian.of(x[np.sort(rows)]), reference)
    for _ in progress(range(resamples)):
        rows, others = (rng.integers(len(x), size=len(x)) for x in (a, b))
        first = far(a, rows)
        apart.append(first - far(b, others))
        if are_pairs:
            together.append(first - far(b, rows))
    band = WIDE * float(np.std(apart, ddof=1))
    if len(seeds) > 1:
        band = max(band, WIDE * float(np.sqrt(2) * np.std(seeds, ddof=1)))
    interval = None
    if are_pairs:
        # resampled sets are farther from the reference, both of them: centre it
        low, high = np.quantile(
            np.asarray(together) - np.mean(together), [0.025, 0.975]
        )
        gap = fids[0] - fids[1]
        interval = float(gap + low), float(gap + high)
    return Gap(
        fids, frechet(*gaussians), interval, band, _apart(a, b, are_pairs), len(seeds)
    )


def distance(features, reference):
    """features [N, D], Gaussian -> FID."""
    if features.shape[1] != len(reference.mean):
        raise UserError(
            f"{features.shape[1]} features, where the reference has "
            f"{len(reference.mean)}: other networks'"
        )
    return frechet(Gaussian.of(features), reference)


def swaps(chain, reference, other_reference=None):
    """[(name, features)] from A to B -> [(name, FID, step)]; the steps add up.

    Each set has one component more of B's than the one before; the first is A. With
    other_reference, B's, the last row exchanges that too.
    """
    rows = []
    for name, features in chain:
        fid = distance(features, reference)
        rows.append((name, fid, fid - rows[-1][1] if rows else 0.0))
    if other_reference is not None:
        fid = distance(chain[-1][1], other_reference)
        rows.append(("reference", fid, fid - rows[-1][1]))
    return rows


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


def _apart(a, b, are_pairs):
    if not are_pairs:
        return None
    gap = np.linalg.norm(np.asarray(a, np.float64) - b, axis=1)
    return float(gap.mean() / np.sqrt((np.asarray(a, np.float64) ** 2).sum(1).mean()))
