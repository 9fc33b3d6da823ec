"""Fréchet distances between features, and what a distance depends on.

All in float64 on the host: TPUs have none, and differences of nearly equal traces need
the digits. Adding up 50,000 features of 2048 numbers costs 0.2 TFLOP, seconds of a CPU,
where the network that made them took 600 TFLOP.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float, Int

BLOCK = 2048  # features whose products are taken together
COVERAGE = 0.95  # of an interval


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean and unbiased covariance of features, in float64."""

    mean: Float[np.ndarray, " d"]
    cov: Float[np.ndarray, "d d"]

    @classmethod
    def of(cls, features: Float[np.ndarray, "n d"]) -> "Gaussian":
        """Fits a Gaussian to features."""
        moments = RunningMoments(features.shape[1])
        moments.add(features)
        return moments.gaussian()


class RunningMoments:
    """Mean and covariance of features that come in batches.

    Blocks are centred before their products are taken, and joined by the update of
    Chan, Golub and LeVeque (1983): nothing cancels, however large the mean is.

    Attributes:
      count: features added so far.
    """

    def __init__(self, width: int):
        self.count = 0
        self._joined, self._waiting = 0, []
        self._mean, self._scatter = np.zeros(width), np.zeros((width, width))

    def add(self, features: Float[np.ndarray, "n d"]) -> None:
        """Adds features of any number."""
        for start in range(0, len(features), BLOCK):
            part = np.asarray(features[start : start + BLOCK], np.float64)
            self._waiting.append(part)
            self.count += len(part)
            if self.count - self._joined >= BLOCK:
                self._join()

    def gaussian(self) -> Gaussian:
        """Returns the Gaussian of all so far; a single feature's covariance is NaN."""
        if self._waiting:
            self._join()
        degrees = self.count - 1 if self.count > 1 else np.nan
        return Gaussian(self._mean.copy(), self._scatter / degrees)

    def _join(self):
        x = np.concatenate(self._waiting)
        mean = x.mean(0)
        x -= mean
        gap, n = mean - self._mean, len(x)
        self._scatter += x.T @ x
        self._scatter += np.outer(gap, gap * (self._joined * n / self.count))
        self._mean += gap * (n / self.count)
        self._joined, self._waiting = self.count, []


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Returns the squared Fréchet distance of two Gaussians.

    With A = F F' the trace of (A B)^1/2 is that of (F' B F)^1/2. The latter's argument
    is symmetric, so eigenvalues suffice, and they are real for covariances of any rank.

    Source: Heusel et al. arXiv:1706.08500, equation 6.
    """
    factor = _factor(a.cov)
    eigenvalues = np.linalg.eigvalsh(factor.T @ b.cov @ factor)
    cross = np.sqrt(np.maximum(eigenvalues, 0)).sum()
    gap = a.mean - b.mean
    return float(gap @ gap + np.trace(a.cov) + np.trace(b.cov) - 2 * cross)


class FrechetInfluence:
    """How much single features move the distance of a Gaussian to a reference.

    The derivative of frechet_distance(here, there) in the direction of one feature x is
    2 (m - r)'(x - m) + (x - m)'(1 - T)(x - m), but for a constant; m and r are the
    means, and T, the optimal transport from here to there, is F (F' S F)^-1/2 F' where
    F F' is there's covariance and S here's. To first order, the distance of a set near
    `here` is that of `here` plus the mean of these.

    Source: Bhatia, Jain and Lim, arXiv:1712.01504.
    """

    def __init__(self, here: Gaussian, there: Gaussian):
        factor = _factor(there.cov)
        values, vectors = np.linalg.eigh(factor.T @ here.cov @ factor)
        kept = values > len(values) * np.finfo(float).eps * values[-1]
        root = values[kept] ** -0.25
        self._transport = (factor @ vectors[:, kept]) * root  # T is this times its own
        self._mean, self._slope = here.mean, 2 * (here.mean - there.mean)

    def __call__(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
        """Returns the influence of each feature, but for a constant common to all."""
        blocks = [features[i : i + BLOCK] for i in range(0, len(features), BLOCK)]
        return np.concatenate([self._of(np.asarray(x, np.float64)) for x in blocks])

    def _of(self, x):
        x = x - self._mean
        transported = np.square(x @ self._transport).sum(1)
        return x @ self._slope + np.square(x).sum(1) - transported


def class_rows(
    labels: Int[np.ndarray, " n"] | None, count: int
) -> list[Int[np.ndarray, " _"]]:
    """Returns the rows of each class, for a bootstrap within classes.

    All rows are one group without labels, and where a class has a single row, which
    tells nothing of its scatter.
    """
    if labels is None or np.unique(labels, return_counts=True)[1].min() < 2:
        return [np.arange(count)]
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def bootstrap_rows(
    groups: Sequence[Int[np.ndarray, " _"]], resamples: int, seed: int = 0
) -> Iterator[Int[np.ndarray, " n"]]:
    """Yields rows drawn with replacement, of each group as many as it has."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.sort(np.concatenate([rng.choice(g, len(g)) for g in groups]))


def bootstrap_interval(
    value: float, resampled: Sequence[float], groups: Sequence[Int[np.ndarray, " _"]]
) -> tuple[float, float]:
    """Returns a 95 % interval of a figure from its resamples.

    Resampled sets are farther from a reference, so the percentiles are moved by as much
    as their mean is off. They scatter less than fresh sets, in a group of n by the
    share 1 / n of the variance, and are widened by what that makes for all.

    Source: Efron's percentiles; images are drawn within their classes, as the number
    of images of each class was decided and does not scatter.
    """
    count = sum(map(len, groups))
    widening = np.sqrt(count / max(count - len(groups), 1))
    tails = (1 - COVERAGE) / 2, (1 + COVERAGE) / 2
    deviations = np.asarray(resampled) - np.mean(resampled)
    low, high = widening * np.quantile(deviations, tails)
    return float(value + low), float(value + high)


def _factor(cov):
    """Returns F with F F' = cov: Cholesky's, or eigenvalues' where the rank is low."""
    try:
        return np.linalg.cholesky(cov)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(cov)
        return vectors * np.sqrt(np.maximum(values, 0))
