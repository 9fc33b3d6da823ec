"""The kernel distance of features, KID: unbiased, also of few images."""

import numpy as np

from sit_jax.errors import UserError

SUBSETS, SIZE, SEED = 100, 1000, 2020  # torch-fidelity's, whose subsets these are


def kernel_distance(samples, reference, subsets=SUBSETS, size=SIZE, progress=iter):
    """Features [N, D] and [M, D] -> mean and standard deviation over random subsets.

    Binkowski et al. arXiv:1801.01401: the squared maximum mean discrepancy under the
    kernel (x y / D + 1)^3, unbiased, hence below zero now and then. In float64.
    """
    size = min(size, len(samples), len(reference))
    if size < 2:
        raise UserError("KID needs at least two features on both sides")
    draw = np.random.RandomState(SEED).choice
    found = []
    for _ in progress(range(subsets)):
        x, y = (
            np.asarray(each[draw(len(each), size, replace=False)], np.float64)
            for each in (samples, reference)
        )
        found.append(_unbiased(x, y))
    return float(np.mean(found)), float(np.std(found))


def _unbiased(x, y):
    """The discrepancy of features [n, D] and [n, D]."""
    n = len(x)
    others = lambda a: (_total(a, a) - _own(a)) / (n * (n - 1))
    return others(x) + others(y) - 2 * _total(x, y) / n**2


def _total(x, y):
    """The kernel, summed over all pairs; in place, for memory is what it waits for."""
    k = x @ y.T
    k /= x.shape[1]
    k += 1
    return np.vdot(k * k, k)


def _own(x):
    """The kernel of each feature with itself, summed."""
    return ((np.square(x).sum(1) / x.shape[1] + 1) ** 3).sum()
