"""Compares two sets of samples: is the gap of their FIDs more than seeds alone make?

Sets that differ by seed only are exchangeable: any way of dealing their images out to
two sets was as likely. How far FIDs scatter over all these ways needs no resampling,
for around the pool of both sets a gap is linear in the images to second order, as its
even terms cancel: Var = sum over classes of s^2 (n / N^2 + m / M^2), s^2 the variance
of the images' influence within a class of n and m images. Where both sets have as many
of each class, that is part of how they were drawn and does not scatter. A bootstrap of
one set says too much: it draws numbers of classes anew, and takes the noise of the set
itself for a distance to the reference. docs/evidence/diagnosis.md has both measured.

Pairs of the same noise and label leave what they share out of the gap.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from scipy import stats

from sit_jax.errors import UserError
from sit_jax.evaluation import fid
from sit_jax.evaluation.fid import (
    FrechetInfluence,
    Gaussian,
    RunningMoments,
    frechet_distance,
)

Features = Float[np.ndarray, "n d"]
Labels = Int[np.ndarray, " n"]

LEVEL = 1e-4  # of gaps by seeds alone that are called beyond noise
RARE = 0.01  # of gaps by seeds alone that are called worth another look
ODD_SEEDS = 1e-2  # of sets of seeds that are taken to scatter more than images explain
WORST = 8  # pairs in the picture


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far the FIDs of A and B are apart, and what seeds alone would make.

    Attributes:
      fids: of A and of B to the reference.
      between: FID of A to B.
      net: the gap without what FID owes to the number of images; the gap itself where
        these are equal.
      noise: the standard deviation of `net` over other seeds; None of too few images.
      band: how large `net` may be by seeds alone; None of too few images.
      chance: the probability that seeds alone make such a gap.
      interval: 95 % of the gap over pairs; None where there are none.
      classes: whether both have as many images of each class.
      feature_gap: mean distance of a pair's features over their root mean square.
      seeds: how many other seeds' FIDs were given.
      scatter: the standard deviation of these.
    """

    fids: tuple[float, float]
    between: float
    net: float
    noise: float | None
    band: float | None
    chance: float | None
    interval: tuple[float, float] | None
    classes: bool
    feature_gap: float | None
    seeds: int
    scatter: float | None

    @property
    def gap(self) -> float:
        """FID of A less that of B."""
        return self.fids[0] - self.fids[1]

    @property
    def within_noise(self) -> bool | None:
        """Whether seeds alone may make such a gap; None of too few images."""
        return None if self.band is None else bool(abs(self.net) <= self.band)

    def to_json(self) -> dict[str, Any]:
        """Returns all of it as it stands in a report."""
        derived = {"gap": self.gap, "within_noise": self.within_noise}
        return dataclasses.asdict(self) | derived

    def sentence(self) -> str:
        """Says all of it in one sentence."""
        a, b = self.fids
        text = f"FID {a:.4g} and {b:.4g}, gap {self.gap:+.3g}"
        if self.band is None:
            return f"Too few images for a noise band: {text}."
        if self.net != self.gap:
            text += f", {self.net:+.3g} at equal numbers of images"
        text += f", noise band {self.band:.3g}, seeds alone: p {self.chance:.2g}"
        if self.interval is not None:
            low, high = self.interval
            text += f", paired 95 % interval {low:+.3g} to {high:+.3g}"
            if self.within_noise and low * high > 0:
                text += ": a real difference that unpaired sets would not show"
        if self.within_noise and self.chance < RARE and self.interval is None:
            text += ": rare, so draw both again with another seed"
        return f"{'Within' if self.within_noise else 'Beyond'} noise: {text}."


def compare(
    a: Features,
    b: Features,
    reference: Gaussian,
    are_pairs: bool,
    *,
    seeds: Sequence[float] = (),
    labels: tuple[Labels, Labels] | None = None,
    resamples: int = 0,
) -> Gap:
    """Compares the features of two sets of samples.

    Args:
      a: features of A's samples.
      b: features of B's, of any number.
      reference: what FIDs are taken to.
      are_pairs: whether row i of both began from the same noise and label.
      seeds: FIDs of further sets that differ by seed only. Where these scatter more
        than the images explain, the band is theirs.
      labels: of a and of b, if they are known.
      resamples: of pairs, for an interval by bootstrap instead of by variance.

    Raises:
      UserError: The sets are no pairs, or of other networks' features.
    """
    if are_pairs and len(a) != len(b):
        raise UserError(f"{len(a)} and {len(b)} images are no pairs")
    if min(len(a), len(b)) < 2:
        raise UserError("a set of one image has no covariance")
    gaussians = [_fit(features, reference) for features in (a, b)]
    fids = tuple(frechet_distance(here, reference) for here in gaussians)
    classes = _balanced_classes(labels, a, b)
    gap = fids[0] - fids[1]
    net, noise = _exchange_noise(a, b, reference, classes)
    if net is None or len(a) == len(b):
        net = gap
    interval = None
    if are_pairs and resamples:
        interval = _bootstrap_interval(a, b, reference, classes[0], resamples)
    elif are_pairs and len(a) > a.shape[1] + 1:
        # each by its own Gaussian: their slopes differ
        ours, theirs = (FrechetInfluence(here, reference) for here in gaussians)
        interval = _pair_interval(gap, ours(a) - theirs(b), classes[0])
    scatter = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None
    noise, band, chance = _noise_band(net, noise, scatter, len(seeds))
    return Gap(
        fids=fids,
        between=frechet_distance(*gaussians),
        net=net,
        noise=noise,
        band=band,
        chance=chance,
        interval=interval,
        classes=bool(classes[0].any()),
        feature_gap=_feature_gap(a, b) if are_pairs else None,
        seeds=len(seeds),
        scatter=scatter,
    )


def fid_of_features(features: Features, reference: Gaussian) -> float:
    """Returns the FID of features to a reference."""
    return frechet_distance(_fit(features, reference), reference)


class SwapStep(NamedTuple):
    """The FID after one more component of B's was taken, and how it changed."""

    name: str
    fid: float
    step: float


def swap_steps(
    chain: Sequence[tuple[str, Features]],
    reference: Gaussian,
    last: tuple[str, Features, Gaussian] | None = None,
) -> list[SwapStep]:
    """Returns how FID goes from A's to B's; the steps add up to the gap.

    Args:
      chain: name and features of sets from A to B. Each has one component more of B's
        than the one before.
      reference: what FIDs are taken to.
      last: name, features and reference of a step that exchanges the reference too.
    """
    sets = [(name, features, reference) for name, features in chain]
    rows = []
    for name, features, target in [*sets, *([last] if last else [])]:
        value = fid_of_features(features, target)
        rows.append(SwapStep(name, value, value - rows[-1].fid if rows else 0.0))
    return rows


def worst_pairs(
    a: Any, b: Any, count: int = WORST
) -> tuple[list[tuple[int, float]], UInt8[np.ndarray, "tiles h w 3"]]:
    """Finds the pairs of images that differ most.

    Args:
      a: an image set of A, see image_sets.py.
      b: one of as many of B's, from the same noise and labels.
      count: how many pairs.

    Returns:
      (image number, root mean square of the difference) of each, and three tiles of
      each: A's, B's, and their difference, stretched to be seen.
    """
    if len(a) != len(b) or a.shape != b.shape:
        raise UserError(
            f"{len(a)} images {a.shape} and {len(b)} {b.shape} are no pairs"
        )
    worst = []
    start = 0
    for ours, theirs in zip(a.batches(256), b.batches(256), strict=True):
        gap = (ours.astype(np.int16) - theirs).astype(np.float32)
        size = np.sqrt((gap**2).mean((1, 2, 3)))
        rows = np.argsort(-size)[:count]
        worst += [(float(size[i]), start + int(i), ours[i], theirs[i]) for i in rows]
        worst = sorted(worst, key=lambda row: (-row[0], row[1]))[:count]
        start += len(ours)
    gaps = [np.abs(x.astype(np.int16) - y) for _, _, x, y in worst]
    largest = max(int(gap.max()) for gap in gaps) or 1
    tiles = []
    for (_, _, x, y), gap in zip(worst, gaps, strict=True):
        tiles += [x, y, np.rint(gap * (255 / largest)).astype(np.uint8)]
    return [(number, size) for size, number, _, _ in worst], np.stack(tiles)


def _fit(features, reference):
    if features.shape[1] != len(reference.mean):
        raise UserError(
            f"{features.shape[1]} features, where the reference has "
            f"{len(reference.mean)}: other networks'"
        )
    return Gaussian.of(features)


def _balanced_classes(labels, a, b):
    """Returns the labels of both, or zeros where they are not as many of each."""
    known = labels is not None and (len(labels[0]), len(labels[1])) == (len(a), len(b))
    if known and np.array_equal(*map(np.sort, labels)):
        return tuple(np.unique(numbers, return_inverse=True)[1] for numbers in labels)
    return np.zeros(len(a), int), np.zeros(len(b), int)


def _feature_gap(a, b):
    """Returns the mean distance of pairs over the root mean square of A's features."""
    a = np.asarray(a, np.float64)
    distances = np.linalg.norm(a - b, axis=1)
    return float(distances.mean() / np.sqrt((a**2).sum(1).mean()))


def _exchange_noise(a, b, reference, classes):
    """Returns the gap by influence, and its deviation over all ways to deal images out.

    Both are None where the images are too few: the pool's covariance is singular.
    """
    if len(a) + len(b) <= a.shape[1] + 1:
        return None, None
    pool = RunningMoments(a.shape[1])
    pool.add(a)
    pool.add(b)
    influence = FrechetInfluence(pool.gaussian(), reference)
    influences = influence(a), influence(b)
    variances = _class_variances(np.concatenate(influences), np.concatenate(classes))
    shares = (np.bincount(numbers) / len(numbers) ** 2 for numbers in classes)
    gap = float(influences[0].mean() - influences[1].mean())
    return gap, float(np.sqrt((variances * sum(shares)).sum()))


def _class_variances(values, classes):
    """Returns the unbiased variance in each class; of a single value 0."""
    count = np.bincount(classes)
    mean = np.bincount(classes, values) / count
    squares = np.bincount(classes, np.square(values - mean[classes]))
    return squares / np.maximum(count - 1, 1)


def _pair_interval(gap, influences, classes):
    """Returns the interval of a gap by the delta method, of pairs as its samples."""
    if np.bincount(classes).min() < 2:
        classes = np.zeros_like(classes)
    count = np.bincount(classes)
    squares = (count * _class_variances(influences, classes)).sum()
    error = np.sqrt(squares) / len(influences)
    half = float(stats.norm.ppf((1 + fid.COVERAGE) / 2) * error)
    return gap - half, gap + half


def _bootstrap_interval(a, b, reference, classes, resamples):
    """Returns the interval by drawing pairs anew, of each class as many."""
    from tqdm import tqdm

    groups = fid.class_rows(classes, len(a))

    def gap(rows):
        ours, theirs = (fid_of_features(x[rows], reference) for x in (a, b))
        return ours - theirs

    rows = fid.bootstrap_rows(groups, resamples)
    bar = tqdm(rows, total=resamples, unit="resamples", disable=None, leave=False)
    return fid.bootstrap_interval(gap(...), [gap(rows) for rows in bar], groups)


def _noise_band(net, noise, scatter, seeds):
    """Returns the noise, the band at LEVEL and the chance of a net gap.

    Other seeds take the place of the images' noise where they scatter more.
    """
    if noise is None:
        return None, None, None
    law = stats.norm
    if scatter is not None:
        degrees, seed_noise = seeds - 1, float(np.sqrt(2) * scatter)
        ratio = degrees * (seed_noise / noise) ** 2
        if ratio > stats.chi2.ppf(1 - ODD_SEEDS, degrees):
            noise, law = seed_noise, stats.t(degrees)
    chance = 2 * law.cdf(-abs(net) / noise) if noise else float(net == 0)
    return noise, float(law.ppf(1 - LEVEL / 2) * noise), float(chance)
