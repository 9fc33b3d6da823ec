"""Distances and scores of features: exact formulas, ADM's recorded figures, scipy."""

import numpy as np
import pytest
from helpers.recorded import arrays, case

from sit_jax.errors import UserError
from sit_jax.evaluation import fid, metrics
from sit_jax.evaluation.fid import (
    FrechetInfluence,
    Gaussian,
    RunningMoments,
    frechet_distance,
)
from sit_jax.evaluation.metrics import (
    InceptionScore,
    kernel_distance,
    neighbour_radii,
    precision_recall,
)

G, ADM = arrays("adm_eval"), case("adm_eval")["results"]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def spd(width, seed=0):
    """A covariance with eigenvalues from 0.1 to 10, in no special direction."""
    turn = np.linalg.qr(normal(width, width, seed=seed))[0]
    return (turn * np.geomspace(0.1, 10, width)) @ turn.T


def spatial(which):
    """ADM's features for sFID: 7 channels, flattened with the channel last."""
    return G[f"spatial_{which}"][..., :7].reshape(len(G[f"spatial_{which}"]), -1)


def score(logits, split, step):
    found = InceptionScore(split)
    for start in range(0, len(logits), step):
        found.add(logits[start : start + step])
    return found.value()


# Gaussians and the Frechet distance


def test_frechet_distance_is_adms_fid():
    found = frechet_distance(Gaussian.of(G["smp"]), Gaussian.of(G["ref"]))
    assert found == pytest.approx(ADM["fid"], rel=1e-6)  # ADM's means are float32
    rounded = (Gaussian(G[f"mu_{each}"], G[f"sigma_{each}"]) for each in ("smp", "ref"))
    assert frechet_distance(*rounded) == pytest.approx(ADM["fid"], rel=1e-7)


def test_frechet_distance_is_adms_sfid():
    found = frechet_distance(Gaussian.of(spatial("smp")), Gaussian.of(spatial("ref")))
    assert found == pytest.approx(ADM["sfid"], rel=1e-6)


def test_frechet_distance_is_adms_for__fewer_images_than_features():
    found = frechet_distance(Gaussian.of(G["low_smp"]), Gaussian.of(G["low_ref"]))
    # the original's root of a singular product is good to 1e-3; 4e-9 found
    assert found == pytest.approx(ADM["fid_rank_deficient"], rel=1e-6)


def test_frechet_distance_of_a_known_map():
    """B = S A S has the map S from A's Gaussian to B's: the cross term is tr(S A)."""
    a, s = spd(40), spd(40, seed=1)
    shift = normal(40)
    one, other = Gaussian(shift, a), Gaussian(np.zeros(40), s @ a @ s)
    want = shift @ shift + np.trace(a) + np.trace(s @ a @ s) - 2 * np.trace(s @ a)
    assert frechet_distance(one, other) == pytest.approx(want, rel=1e-10)
    assert frechet_distance(other, one) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("count", [2, 20, 64])
def test_frechet_distance_of_few_images_is_finite(count):
    a, b = (Gaussian.of(normal(count, 64, seed=seed)) for seed in (0, 1))
    assert np.isfinite(frechet_distance(a, b)) and frechet_distance(a, b) > 1
    # eigenvalues of zero come out as 1e-16 of the largest, their roots as 1e-8
    assert abs(frechet_distance(a, a)) < 1e-5


@pytest.mark.parametrize("step", [1, 7, 16, 100])
def test_running_moments_do_not_depend_on_batches(step, monkeypatch):
    monkeypatch.setattr(fid, "BLOCK", 16)
    features = normal(100, 5) @ normal(5, 5, seed=1) + 1e6  # a mean that would cancel
    moments = RunningMoments(5)
    for start in range(0, 100, step):
        moments.add(features[start : start + step])
        moments.gaussian()  # a look changes nothing
    assert moments.count == 100
    found = moments.gaussian()
    np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.cov, np.cov(features.T), rtol=1e-9)


# Inception Score


@pytest.mark.parametrize(
    "which, split, name",
    [
        ("smp", 5000, "inception_score_default_split5000"),
        ("smp", 100, "inception_score_split100"),
        ("ref", 5000, "inception_score_ref_default"),
    ],
)
def test_inception_score_is_adms(which, split, name):
    """100 makes a ragged last split, of 60, that counts as much as the others."""
    logits = G[which] @ G["softmax_w"]
    for step in (1000, 37):
        assert score(logits, split, step) == pytest.approx(ADM[name], rel=1e-6)


def test_inception_score_of_certainty_is_the_number_of_classes():
    logits = 1e4 * np.eye(10)[np.arange(200) % 10]  # probabilities of exactly 0 and 1
    assert score(logits, 5000, 50) == pytest.approx(10, rel=1e-12)
    assert score(np.zeros((200, 10)), 50, 30) == pytest.approx(1, rel=1e-12)
    assert np.isnan(InceptionScore().value())


# Precision and recall


def neighbours(a, b):
    """Squared distances in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return ((a[:, None] - b[None]) ** 2).sum(-1)


def test_precision_recall_are_adms():
    precision, recall = precision_recall(G["smp"], G["ref"])
    assert precision == ADM["precision_f32"]  # the nearest border is 9e-4 away
    assert recall == ADM["recall_f32"]
    # ADM's float16 distances: one of the 360 samples is on the other side
    assert abs(precision - ADM["precision_f16"]) * 360 == pytest.approx(1)
    assert recall == ADM["recall_f16"]


@pytest.mark.parametrize("which", ["ref", "smp"])
def test_recorded_neighbour_radii(which):
    found = neighbour_radii(G[which])
    # cancellation: |u|^2 - 2 u v + |v|^2 is 10 times smaller than its terms
    np.testing.assert_allclose(found, G[f"radii_{which}_f32"], rtol=2e-5)


@pytest.mark.parametrize("block", [100, 4096])
def test_precision_recall_do_not_depend_on_blocks(block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    seen = []
    progress = lambda blocks: seen.extend(blocks) or iter(blocks)
    found = precision_recall(G["smp"], G["ref"], progress)
    assert found == (ADM["precision_f32"], ADM["recall_f32"])
    a, b = -(-360 // min(block, 400)), -(-400 // min(block, 400))
    assert len(seen) == a * (a + 1) // 2 + b * (b + 1) // 2 + a * b


def test_precision_recall_equal_the_definition():
    samples, reference = normal(50, 3), normal(40, 3, seed=1) * 0.7 + 0.4
    reach = [np.sort(neighbours(x, x), 1)[:, 3] for x in (samples, reference)]
    across = neighbours(samples, reference)
    want = (
        (across <= reach[1][None]).any(1).mean(),
        (across <= reach[0][:, None]).any(0).mean(),
    )
    assert precision_recall(samples, reference) == pytest.approx(want, abs=1e-12)
    assert 0 < want[0] < 1 and 0 < want[1] < 1


def test_precision_recall_of_duplicates():
    """Four equal features reach nowhere, and are inside where they equal another."""
    same = np.repeat(normal(2, 3), 4, 0).astype(np.float32)
    np.testing.assert_allclose(neighbour_radii(same), 0, atol=1e-5)
    assert precision_recall(same, same) == (1, 1)
    assert precision_recall(same, same + 9) == (0, 0)


# KID


def test_kid_is_torch_fidelitys():
    """kid_features_to_metric of torch-fidelity 0.4.0, which computes in float32."""
    draw = np.random.RandomState(0).standard_normal
    a = draw((150, 8)).astype(np.float32)
    b = (draw((120, 8)) * 1.2 + 0.3).astype(np.float32)
    want = 0.4709521770477295, 0.12828092624954887
    kid = kernel_distance(a, b, subsets=10, size=50)
    assert (kid["kid"], kid["kid_std"]) == pytest.approx(want, rel=2e-6)


def test_kid_is_unbiased():
    a, b = normal(2000, 4), normal(2000, 4, seed=1)
    kid = kernel_distance(a, b, subsets=100, size=100)
    # of the same distribution; sets overlap little, so the mean's error is a tenth
    assert abs(kid["kid"]) < 0.4 * kid["kid_std"]
    other = kernel_distance(a, b + 0.5, subsets=20, size=100)
    assert other["kid"] > kid["kid_std"]


def test_kid_of_few_images_takes_smaller_subsets():
    kid = kernel_distance(normal(5, 2), normal(3, 2), subsets=4)
    assert np.isfinite(kid["kid"]) and kid["kid_subsets"] == [4, 3]
    with pytest.raises(UserError, match="KID needs at least two"):
        kernel_distance(normal(5, 2), normal(1, 2))


@pytest.mark.parametrize(("rank", "off"), [(5, 1e-5), (3, 1e-3)])
def test_influence_is_the_derivative_of_the_distance(rank, off):
    """Also to a reference of lower rank, where roots of rounding are left: 1e-8 / eps.

    Of full rank it is eps^2.
    """
    rng = np.random.default_rng(0)
    root = rng.standard_normal((5, rank))
    there = Gaussian(rng.standard_normal(5), root @ root.T)
    x = rng.standard_normal((400, 5)) @ rng.standard_normal((5, 5)) + 1
    y = rng.standard_normal((7, 5)) + 2
    here, eps = Gaussian(x.mean(0), np.cov(x.T, bias=True)), 1e-4

    def mixed(share):
        """x, and y with this share of the weight."""
        weights = np.r_[np.full(400, (1 - share) / 400), np.full(7, share / 7)]
        both = np.concatenate([x, y])
        mean = weights @ both
        gap = both - mean
        return frechet_distance(Gaussian(mean, (weights[:, None] * gap).T @ gap), there)

    influence = FrechetInfluence(here, there)
    slope = (mixed(eps) - mixed(-eps)) / (2 * eps)
    want = influence(y).mean() - influence(x).mean()
    assert slope == pytest.approx(want, rel=off)
