"""Distances between sets of features."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean [D] and covariance [D, D] of features, in float64."""

    mean: np.ndarray
    cov: np.ndarray

    @classmethod
    def of(cls, features):
        """features [N, D] -> their Gaussian, with the unbiased covariance."""
        features = np.asarray(features, np.float64)
        return cls(features.mean(0), np.cov(features, rowvar=False))


def frechet(a, b):
    """Squared Frechet distance of two Gaussians, Heusel et al. arXiv:1706.08500 eq. 6.

    The trace of (A B)^1/2 is that of (A^1/2 B A^1/2)^1/2, whose argument is symmetric:
    eigenvalues suffice, and covariances of less than full rank stay finite.
    """
    root = _root(a.cov)
    shared = np.linalg.eigvalsh(root @ b.cov @ root)
    cross = np.sqrt(np.maximum(shared, 0)).sum()
    gap = a.mean - b.mean
    return float(gap @ gap + np.trace(a.cov) + np.trace(b.cov) - 2 * cross)


def _root(cov):
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
