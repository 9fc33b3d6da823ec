"""The bootstrap by strata: what an interval holds still, and how wide it has to be.

Efron's percentiles over sets drawn with replacement. Where a set has so many images of
each class because that was decided, other such sets have as many: images are drawn anew
within their classes, for what the classes differ by does not scatter.
"""

import numpy as np

COVERED = 0.95  # of an interval


def strata(labels, count):
    """-> rows of each class, of `count` rows; of all together without labels, and
    where a class has a single row, which tells nothing of its scatter.
    """
    if labels is None or np.unique(labels, return_counts=True)[1].min() < 2:
        return [np.arange(count)]
    return [np.flatnonzero(labels == each) for each in np.unique(labels)]


def draws(groups, resamples, seed=0):
    """Yields rows int [N], of each group as many as it has."""
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        yield np.sort(np.concatenate([rng.choice(g, len(g)) for g in groups]))


def interval(value, found, groups):
    """A figure, and those of resamples -> (low, high).

    Resampled sets are farther from a reference: the percentiles are moved by as much
    as their mean is off. They scatter less than fresh sets, in a group of n by the
    share 1 / n of the variance, and are widened by what that makes for all.
    """
    count = sum(map(len, groups))
    wider = np.sqrt(count / max(count - len(groups), 1))
    tails = (1 - COVERED) / 2, (1 + COVERED) / 2
    low, high = wider * np.quantile(np.asarray(found) - np.mean(found), tails)
    return float(value + low), float(value + high)
