"""Intervals by resampling: against exact variances, with and without classes."""

import json

import numpy as np
import pytest

from sit_jax.evaluation.evaluate import fixed_labels, frechet_interval
from sit_jax.evaluation.fid import (
    Gaussian,
    bootstrap_interval,
    bootstrap_rows,
    class_rows,
    frechet_distance,
)

# Thirty images of each of six classes, one feature: c_k + N(0, 1). From a reference
# without variance their distance is (mean - r)^2 + variance, whose law is known.
EACH, CENTRES, THERE = 30, np.array([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]), 1.0
LABELS = np.repeat(np.arange(len(CENTRES)), EACH)
POINT = Gaussian(np.array([THERE]), np.zeros((1, 1)))


def drawn(seed):
    noise = np.random.default_rng(seed).standard_normal((len(LABELS), 1))
    return CENTRES[LABELS][:, None] + noise


def law():
    """-> mean and variance of the distance: a normal mean, a noncentral chi-square."""
    count, gap = len(LABELS), CENTRES.mean() - THERE
    apart = EACH * np.square(CENTRES - CENTRES.mean()).sum()
    mean = gap**2 + 1 / count + (count - 1 + apart) / (count - 1)
    of_mean = 4 * gap**2 / count + 2 / count**2
    return mean, of_mean + (2 * (count - 1) + 4 * apart) / (count - 1) ** 2


def test_frechet_interval_by_class_is_as_wide_as_the_exact_law():
    mean, variance = law()
    found = [frechet_interval(drawn(seed), POINT, 100, LABELS) for seed in range(200)]
    low, high = np.transpose(found)
    # 200 intervals of 100 resamples each: 2 % of their mean width; percentiles of so
    # few resamples are 2 % narrow
    width = 2 * 1.96 * variance**0.5
    assert np.mean(high - low) == pytest.approx(width, rel=0.06)
    # of 200 at 0.95, four standard deviations are 0.062
    assert np.mean((low < mean) & (mean < high)) == pytest.approx(0.95, abs=0.065)
    assert low.mean() < mean < high.mean()


def test_frechet_interval_without_classes_covers_their_scatter():
    def scattered(seed):
        rng = np.random.default_rng(seed)
        labels = rng.integers(len(CENTRES), size=len(LABELS))
        return CENTRES[labels][:, None] + rng.standard_normal((len(LABELS), 1))

    true = np.std(
        [frechet_distance(Gaussian.of(scattered(i)), POINT) for i in range(2000)]
    )
    found = [np.diff(frechet_interval(scattered(i), POINT, 60)) for i in range(100)]
    assert np.mean(found) == pytest.approx(3.92 * true, rel=0.1)
    assert np.mean(found) > 1.15 * 3.92 * law()[1] ** 0.5


def test_bootstrap_interval_is_widened_for_pairs_in_a_class():
    """Two of a class scatter half as much when they are drawn from themselves."""
    groups = class_rows(np.repeat(np.arange(50), 2), 100)
    x = np.random.default_rng(0).standard_normal(100)
    found = [x[rows].mean() for rows in bootstrap_rows(groups, 2000)]
    low, high = bootstrap_interval(0.0, found, groups)
    true = np.sqrt(np.mean([np.var(x[g], ddof=1) for g in groups]) / 100)
    assert high - low == pytest.approx(3.92 * true, rel=0.08)


def test_class_rows_are_one_group_if_a_class_has_one_image():
    assert len(class_rows(np.array([0, 0, 1]), 3)) == 1
    assert len(class_rows(np.array([0, 0, 1, 1]), 4)) == 2
    assert len(class_rows(None, 3)) == 1


def test_frechet_interval_lies_around_the_distance():
    """Of few images, all resamples are farther away than the images themselves."""
    features = np.random.default_rng(0).standard_normal((80, 20))
    reference = Gaussian(np.zeros(20), np.eye(20))
    value = frechet_distance(Gaussian.of(features), reference)
    low, high = frechet_interval(features, reference, 50)
    assert low < value < high < 1.5 * value


def test_fixed_labels_are_those_whose_counts_were_decided(tmp_path):
    listed, random = (
        np.repeat([3, 7], 10),
        np.random.default_rng(0).integers(9, size=20),
    )
    for name, labels in {"a": listed, "b": random, "c": np.arange(20.0)}.items():
        np.savez(tmp_path / f"{name}.npz", arr_0=np.zeros(1), arr_1=labels)
    np.testing.assert_array_equal(fixed_labels(tmp_path / "a.npz", 20), listed)
    assert fixed_labels(tmp_path / "a.npz", 19) is None  # of other images
    assert fixed_labels(tmp_path / "b.npz", 20) is None
    assert fixed_labels(tmp_path / "c.npz", 20) is None
    said = {"job": {"labels": [*range(9), 0], "config": {"model": {"classes": 9}}}}
    (tmp_path / "b.npz.manifest.json").write_text(json.dumps(said))
    assert len(fixed_labels(tmp_path / "b.npz", 10)) == 10
