"""Figures that compare a set of features with another one."""

from sit_jax.evaluation.metrics.gaussian import Gaussian, Moments, frechet

__all__ = ["Gaussian", "Moments", "frechet"]
