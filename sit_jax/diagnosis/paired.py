"""Two sets of samples: is the gap of their FIDs more than other seeds alone make?

Sets that differ by seed only are exchangeable: any way of dealing their images out to
two sets was as likely. How far FIDs scatter over all these ways needs no resampling,
for around the pool of both sets a gap is linear in the images to second order, as its
even terms cancel: Var = sum over classes of s^2 (n / N^2 + m / M^2), s^2 the variance
of the images' influence within a class of n and m images. Where both sets have as many
of each class, that is part of how they were drawn and does not scatter. A bootstrap of
one set says too much: it draws numbers of classes anew, and takes the noise of the set
itself for a distance to the reference. docs/tpu_vs_gpu.md has both measured.

Pairs of the same noise and label leave what they share out of the gap.
"""

import dataclasses
from statistics import NormalDist

import numpy as np

from sit_jax.errors import UserError
from sit_jax.evaluation import fid
from sit_jax.evaluation.fid import (
    FrechetInfluence,
    Gaussian,
    RunningMoments,
    frechet_distance,
)

LEVEL = 1e-4  # of gaps by seeds alone that are called beyond noise
RARE = 0.01  # of gaps by seeds alone that are called worth another look
ODD_SEEDS = 1e-2  # of sets of seeds that are taken to scatter more than images explain


@dataclasses.dataclass(frozen=True)
class Gap:
    """fids: of A and B to the reference; between: of A to B.

    net: the gap but for what FID owes to the number of images; the gap itself where
    these are equal. noise: standard deviation of net over other seeds, and band how
    large it may be by them; None of too few images. chance: that seeds alone make such
    a gap. interval: 95 % of the gap over pairs, None where there are none. classes:
    whether both have as many images of each class. feature_gap: mean distance of a
    pair's features over their root mean square. scatter: of the FIDs of other seeds.
    """

    fids: tuple
    between: float
    net: float
    noise: float | None
    band: float | None
    chance: float | None
    interval: tuple | None
    classes: bool
    feature_gap: float | None
    seeds: int
    scatter: float | None

    @property
    def gap(self):
        return self.fids[0] - self.fids[1]

    @property
    def within_noise(self):
        return None if self.band is None else bool(abs(self.net) <= self.band)

    def sentence(self):
        a, b = self.fids
        said = f"FID {a:.4g} and {b:.4g}, gap {self.gap:+.3g}"
        if self.band is None:
            return f"Too few images for a noise band: {said}."
        if self.net != self.gap:
            said += f", {self.net:+.3g} at equal numbers of images"
        said += f", noise band {self.band:.3g}, seeds alone: p {self.chance:.2g}"
        if self.interval is not None:
            low, high = self.interval
            said += f", paired 95 % interval {low:+.3g} to {high:+.3g}"
            if self.within_noise and low * high > 0:
                said += ": a real difference that unpaired sets would not show"
        if self.within_noise and self.chance < RARE and self.interval is None:
            said += ": rare, so draw both again with another seed"
        return f"{'Within' if self.within_noise else 'Beyond'} noise: {said}."


def compare(a, b, reference, are_pairs, seeds=(), labels=None, resamples=0):
    """Features a [N, D], b [M, D] and a Gaussian -> Gap.

    seeds: FIDs of further sets that differ by seed only; where these scatter more than
    the images explain, the band is theirs. are_pairs: row i of both began from the same
    noise and label. labels: of a and b, int [N] and [M], if they are known. resamples:
    of pairs, for an interval by bootstrap instead of by variance.
    """
    _require(a, b, are_pairs)
    gaussians = tuple(_gaussian(x, reference) for x in (a, b))
    fids = tuple(frechet_distance(each, reference) for each in gaussians)
    classes = _classes(labels, a, b)
    noise, at_equal_numbers = _noise(a, b, reference, classes)
    net = fids[0] - fids[1]
    if len(a) != len(b) and noise is not None:
        net = at_equal_numbers
    interval = None
    if are_pairs and resamples:
        interval = _resampled(a, b, reference, classes, resamples)
    elif are_pairs and len(a) > a.shape[1] + 1:
        each = zip(gaussians, (a, b), strict=True)  # its own: their slopes differ
        own = [FrechetInfluence(here, reference)(x) for here, x in each]
        interval = _paired(fids[0] - fids[1], own[0] - own[1], classes[0])
    scatter = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None
    noise, band, chance = _judged(net, noise, scatter, len(seeds))
    return Gap(
        fids=fids,
        between=frechet_distance(*gaussians),
        net=net,
        noise=noise,
        band=band,
        chance=chance,
        interval=interval,
        classes=bool(classes[0].any()),
        feature_gap=_apart(a, b, are_pairs),
        seeds=len(seeds),
        scatter=scatter,
    )


def distance(features, reference):
    """features [N, D], Gaussian -> FID."""
    return frechet_distance(_gaussian(features, reference), reference)


def _require(a, b, are_pairs):
    """Refuses features that cannot be compared."""
    if a.shape[1:] != b.shape[1:]:
        raise UserError(f"features are {a.shape[1]} numbers in A, {b.shape[1]} in B")
    if are_pairs and len(a) != len(b):
        raise UserError(f"{len(a)} and {len(b)} images are no pairs")
    if min(len(a), len(b)) < 2:
        raise UserError("a set of one image has no covariance")


def _gaussian(features, reference):
    if features.shape[1] != len(reference.mean):
        raise UserError(
            f"{features.shape[1]} features, where the reference has "
            f"{len(reference.mean)}: other networks'"
        )
    return Gaussian.of(features)


def _noise(a, b, reference, classes):
    """-> standard deviation of the gap over seeds, and the gap at equal numbers.

    Both None where the images of both are too few for the pool's transport.
    """
    if len(a) + len(b) <= a.shape[1] + 1:
        return None, None
    influence = FrechetInfluence(_pool(a, b), reference)
    shares = influence(a), influence(b)
    net = float(shares[0].mean() - shares[1].mean())
    return float(np.sqrt(_variance(shares, classes))), net


def _pool(a, b):
    both = RunningMoments(a.shape[1])
    both.add(a)
    both.add(b)
    return both.gaussian()


def swaps(chain, reference, last=None):
    """[(name, features)] from A to B -> [(name, FID, step)]; the steps add up.

    Each set has one component more of B's than the one before; the first is A. last:
    (name, features, Gaussian) of what exchanges the reference too.
    """
    ways = [(name, features, reference) for name, features in chain]
    rows = []
    for name, features, there in [*ways, *([last] if last else [])]:
        fid = distance(features, there)
        rows.append((name, fid, fid - rows[-1][1] if rows else 0.0))
    return rows


def _classes(labels, a, b):
    """-> labels of both, or zeros where they are not as many of each."""
    alike = labels is not None and (len(labels[0]), len(labels[1])) == (len(a), len(b))
    if alike and np.array_equal(*map(np.sort, labels)):
        return tuple(np.unique(each, return_inverse=True)[1] for each in labels)
    return np.zeros(len(a), int), np.zeros(len(b), int)


def _variance(shares, classes):
    """Of the difference of two sets' means, over all ways to deal out their images."""
    counts = [np.bincount(each) for each in classes]
    squares = _variances(np.concatenate(shares), np.concatenate(classes))
    parts = (n / len(each) ** 2 for n, each in zip(counts, shares, strict=True))
    return float((squares * sum(parts)).sum())


def _variances(values, classes):
    """[N] -> [K], unbiased in each class; of a single one 0."""
    count = np.bincount(classes)
    mean = np.bincount(classes, values) / count
    squares = np.bincount(classes, np.square(values - mean[classes]))
    return squares / np.maximum(count - 1, 1)


def _paired(gap, shares, classes):
    """A gap and what each pair adds to it [N] -> (low, high), by the delta method."""
    if np.bincount(classes).min() < 2:
        classes = np.zeros_like(classes)
    count = np.bincount(classes)
    error = np.sqrt((count * _variances(shares, classes)).sum()) / len(shares)
    half = float(NormalDist().inv_cdf((1 + fid.COVERAGE) / 2) * error)
    return gap - half, gap + half


def _resampled(a, b, reference, classes, resamples):
    """The interval by drawing pairs anew, of each class as many."""
    from tqdm import tqdm

    groups = fid.class_rows(classes[0], len(a))
    gap = lambda *rows: distance(a[rows], reference) - distance(b[rows], reference)
    drawn = fid.bootstrap_rows(groups, resamples)
    bar = tqdm(drawn, total=resamples, unit="resamples", disable=None, leave=False)
    return fid.bootstrap_interval(gap(...), [gap(rows) for rows in bar], groups)


def _judged(net, noise, scatter, seeds):
    """-> noise, the band at LEVEL, and the chance of net; seeds may know better."""
    if noise is None:
        return None, None, None
    law = NormalDist()
    quantile, tail = law.inv_cdf(1 - LEVEL / 2), law.cdf
    if scatter is not None:
        from scipy import stats

        free, theirs = seeds - 1, np.sqrt(2) * scatter
        if free * (theirs / noise) ** 2 > stats.chi2.ppf(1 - ODD_SEEDS, free):
            noise, law = float(theirs), stats.t(free)
            quantile, tail = law.ppf(1 - LEVEL / 2), law.cdf
    chance = 2 * tail(-abs(net) / noise) if noise else float(net == 0)
    return noise, float(quantile * noise), float(chance)


def _apart(a, b, are_pairs):
    if not are_pairs:
        return None
    gap = np.linalg.norm(np.asarray(a, np.float64) - b, axis=1)
    return float(gap.mean() / np.sqrt((np.asarray(a, np.float64) ** 2).sum(1).mean()))


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
