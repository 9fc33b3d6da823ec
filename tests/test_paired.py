"""Statistics of two sample sets, on features whose distances are known."""

import json

import numpy as np
import pytest
import small
from PIL import Image

import diagnose
from sit_jax import paired
from sit_jax.errors import UserError
from sit_jax.image_sets import ArrayImages
from sit_jax.metrics.gaussian import Gaussian, frechet

WIDTH = 6
REFERENCE = Gaussian(np.full(WIDTH, 0.3), np.eye(WIDTH))


def drawn(seed, count=400, shift=0.0):
    return np.random.default_rng(seed).standard_normal((count, WIDTH)) + shift


@pytest.mark.parametrize("seed", range(20))
def test_sets_that_differ_by_seed_are_within_noise(seed):
    a, b = drawn(2 * seed), drawn(2 * seed + 1)
    gap = paired.compare(a, b, REFERENCE, are_pairs=False, resamples=20, seed=seed)
    assert gap.within_noise and gap.sentence().startswith("Within noise: FID")


def test_a_real_shift_is_beyond_it():
    a, b = drawn(0), drawn(1, shift=0.15)
    gap = paired.compare(a, b, REFERENCE, are_pairs=False)
    assert not gap.within_noise and gap.sentence().startswith("Beyond noise: FID")
    # (0.3^2 - 0.15^2) in each of six features, and what 400 samples scatter
    assert gap.gap == pytest.approx(WIDTH * (0.3**2 - 0.15**2), rel=0.3)
    assert gap.interval is None and gap.feature_gap is None


def test_pairs_tell_what_sets_cannot():
    """A small shift of the same samples is sure in pairs, and within noise without."""
    a = drawn(0)
    b = a + 0.02
    gap = paired.compare(a, b, REFERENCE, are_pairs=True)
    low, high = gap.interval
    assert low < gap.gap < high and low > 0 and gap.within_noise
    assert gap.sentence().endswith(
        "a real difference that unpaired sets would not show."
    )
    assert gap.between == pytest.approx(WIDTH * 0.02**2, rel=1e-6)
    size = np.sqrt((a**2).sum(1).mean())
    assert gap.feature_gap == pytest.approx(0.02 * np.sqrt(WIDTH) / size, rel=1e-9)


def test_seeds_widen_the_band():
    a, b = drawn(0), drawn(1)
    narrow = paired.compare(a, b, REFERENCE, are_pairs=False)
    wide = paired.compare(a, b, REFERENCE, are_pairs=False, seeds=[1.0, 2.0, 3.0])
    assert wide.band == pytest.approx(paired.WIDE * np.sqrt(2))
    assert narrow.band < 1


def test_swaps_add_up_to_the_gap():
    sets = [("A", drawn(0)), ("latents", drawn(1, shift=0.1)), ("B", drawn(2, shift=1))]
    other = Gaussian(np.zeros(WIDTH), np.eye(WIDTH))
    rows = paired.swaps(sets, REFERENCE, other)
    assert [name for name, *_ in rows] == ["A", "latents", "B", "reference"]
    ends = (
        frechet(Gaussian.of(sets[0][1]), REFERENCE),
        frechet(Gaussian.of(sets[2][1]), other),
    )
    assert sum(step for *_, step in rows) == pytest.approx(ends[1] - ends[0], rel=1e-6)


def test_the_worst_pairs_come_first():
    rng = np.random.default_rng(0)
    a = rng.integers(0, 200, (300, 4, 4, 3)).astype(np.uint8)
    b = a.copy()
    b[290] += 50
    b[7, 0, 0, 0] += 40
    worst, tiles = paired.worst_pairs(ArrayImages(a), ArrayImages(b), 2)
    assert [i for i, _ in worst] == [290, 7] and worst[0][1] == 50
    assert tiles.shape == (6, 4, 4, 3)
    np.testing.assert_array_equal(tiles[0], a[290])
    np.testing.assert_array_equal(tiles[4], b[7])
    assert (tiles[2] == 255).all() and tiles[5].max() == 255 * 40 // 50


def test_other_features_are_refused():
    with pytest.raises(UserError, match="6 numbers in A, 5 in B"):
        paired.compare(drawn(0), drawn(1)[:, :5], REFERENCE, are_pairs=False)
    with pytest.raises(UserError, match="400 and 300 images are no pairs"):
        paired.compare(drawn(0), drawn(1, 300), REFERENCE, are_pairs=True)
    with pytest.raises(UserError, match="4 features, where the reference has 6"):
        paired.compare(*(drawn(i)[:, :4] for i in (0, 1)), REFERENCE, False)


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *words: small.called(diagnose.main, monkeypatch, capsys, *words)


def test_features_files_on_the_command_line(tmp_path, run):
    path = lambda name: tmp_path / f"{name}.npz"
    for i, name in enumerate(("a", "b", "s0", "s1", "s2")):
        np.savez(path(name), features=drawn(i).astype(np.float32))
    np.savez(path("mid"), features=drawn(0, shift=0.1).astype(np.float32))
    np.savez(path("ref"), features=drawn(9, shift=0.3).astype(np.float32))
    seeds = [w for n in ("s0", "s1", "s2") for w in ("--seeds", path(n))]
    flags = ("--reference", path("ref"), "--out", tmp_path / "r", *seeds)
    swap = ("--swap", f"latents={path('mid')}")
    code, out, err = run(path("a"), path("b"), *flags, *swap)
    assert code == 0 and out.startswith("Within noise: FID "), err
    assert "Without two manifests the cause cannot be told." in out
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    fids = found["paired"]["fids"]
    steps = [row["step"] for row in found["swaps"]]
    assert sum(steps) == pytest.approx(fids[1] - fids[0], rel=1e-6)
    assert found["paired"]["seeds"] == 3 and found["paired"]["interval"] is None
    out = tmp_path / "r2"
    code, _, err = run(path("a"), path("b"), *flags[:2], "--out", out, "--swap", "x")
    assert code == 2 and "NAME=FEATURES.npz" in err and not out.exists()
    damaged = path("b").read_bytes()[:-9]
    path("b").write_bytes(damaged)
    code, _, err = run(path("a"), path("b"), *flags[:2], "--out", out)
    assert code == 2 and "ends too early" in err and not out.exists()


def test_pairs_of_pictures_on_the_command_line(tmp_path, run):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (10, 4, 4, 3)).astype(np.uint8)
    manifest = {"job": {"seed": 0, "labels": [1] * 10, "noise": None}}
    for name, shift in (("a", 0), ("b", 3)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images + np.uint8(shift))
        manifest["job"]["rounding"] = ("brighter", "darker")[shift > 0]
        text = json.dumps(manifest)
        (tmp_path / f"{name}.npz.manifest.json").write_text(text)
    sides = (tmp_path / "a.npz", tmp_path / "b.npz")
    code, out, err = run(*sides, "--out", tmp_path / "r")
    assert code == 0 and "Likeliest cause: rounding (" in out, err
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert len(found["worst"]) == 8 and found["worst"][0]["rms"] == 3
    picture = np.asarray(Image.open(tmp_path / "r" / "worst_pairs.png"))
    assert picture.shape == (8 * 66 + 2, 3 * 66 + 2, 3)
