"""Statistics of two sample sets, on features whose distances are known."""

import json

import numpy as np
import pytest
from helpers import small
from PIL import Image

from sit_jax.cli import diagnose
from sit_jax.diagnosis import paired
from sit_jax.diagnosis.paired import worst_pairs
from sit_jax.errors import UserError
from sit_jax.evaluation.fid import Gaussian, frechet_distance
from sit_jax.evaluation.image_sets import NpzImages
from sit_jax.sampling.outputs import ArrayFile

WIDTH = 6
REFERENCE = Gaussian(np.full(WIDTH, 0.3), np.eye(WIDTH))


def drawn(seed, count=400, shift=0.0):
    return np.random.default_rng(seed).standard_normal((count, WIDTH)) + shift


@pytest.mark.parametrize("seed", range(20))
def test_sets_that_differ_by_seed_are_within_noise(seed):
    a, b = drawn(2 * seed), drawn(2 * seed + 1)
    gap = paired.compare(a, b, REFERENCE, are_pairs=False)
    assert gap.within_noise and gap.sentence().startswith("Within noise: FID")


LABELS = np.arange(400) % 4
LAWS = {  # draw(seed, shift), the reference, labels
    "far": (drawn, REFERENCE, None),
    "the reference itself": (drawn, Gaussian(np.zeros(WIDTH), np.eye(WIDTH)), None),
    "classes": (
        lambda seed, **more: (
            drawn(seed, **more) + np.eye(4, WIDTH)[LABELS] * LABELS[:, None]
        ),
        REFERENCE,
        (LABELS, LABELS),
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_noise_is_what_gaps_of_seeds_scatter_by(name):
    """Over 300 pairs; of so many a standard deviation is known to 4 %."""
    draw, there, labels = LAWS[name]
    found = [
        paired.compare(draw(i), draw(1000 + i), there, False, labels=labels)
        for i in range(300)
    ]
    scores = np.array([each.gap / each.noise for each in found])
    assert np.sqrt(np.mean(scores**2)) == pytest.approx(1, abs=0.12)
    # 3 of 1 % are expected, and more than 9 come once in 1,000
    assert sum(each.chance < 0.01 for each in found) <= 9
    assert all(each.classes == (name == "classes") for each in found)


def test_balanced_classes_narrow_the_band():
    """What the numbers of classes would add does not scatter."""
    draw, there, labels = LAWS["classes"]
    known, unknown = (
        paired.compare(draw(0), draw(1), there, False, labels=each)
        for each in (labels, None)
    )
    assert known.noise < 0.8 * unknown.noise and not unknown.classes
    assert unknown.interval is None and unknown.feature_gap is None
    other = LABELS, np.roll(LABELS, 1) * 0  # another policy: classes scatter too
    found = paired.compare(draw(0), draw(1), there, False, labels=other)
    assert found.noise == unknown.noise


def test_gap_of_eight_deviations_is_beyond_noise():
    """In 20 of 20 pairs, and 4 deviations of a bootstrap would miss most of them."""
    draw, there, labels = LAWS["classes"]
    noise = paired.compare(draw(0), draw(1), there, False, labels=labels).noise
    slope = 2 * (draw(0).mean(0) - there.mean)
    shift = 8 * noise * slope / (slope @ slope)
    for seed in range(20):
        a, b = draw(seed, shift=shift), draw(1000 + seed)
        gap = paired.compare(a, b, there, False, labels=labels)
        assert not gap.within_noise and gap.sentence().startswith("Beyond noise")


def test_pairs_show_a_shift_that_sets_do_not():
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
    drawn_anew = paired.compare(a, b, REFERENCE, are_pairs=True, resamples=400)
    spread = np.ptp(drawn_anew.interval) / np.ptp(gap.interval)
    assert spread == pytest.approx(1, abs=0.15)  # 400 resamples know it to 6 %
    size = np.sqrt((a**2).sum(1).mean())
    assert gap.feature_gap == pytest.approx(0.02 * np.sqrt(WIDTH) / size, rel=1e-9)


def test_seeds_widen_the_band_where_they_scatter_more():
    a, b = drawn(0), drawn(1)
    alone = paired.compare(a, b, REFERENCE, are_pairs=False)
    far = alone.fids[0] + alone.noise * np.array([-0.7, 0.2, 0.8])
    agreeing = paired.compare(a, b, REFERENCE, are_pairs=False, seeds=far)
    assert agreeing.band == alone.band and agreeing.seeds == 3
    wide = paired.compare(a, b, REFERENCE, are_pairs=False, seeds=[1.0, 2.0, 3.0])
    assert wide.noise == pytest.approx(np.sqrt(2)) and wide.scatter == 1
    # Student's t of 2 degrees of freedom
    assert wide.band == pytest.approx(99.992 * np.sqrt(2), rel=1e-4)


def test_number_of_images_moves_fid_but_not_the_verdict():
    draw = lambda seed, n: np.random.default_rng(seed).standard_normal((n, 40))
    there = Gaussian(np.zeros(40), np.eye(40))
    gap = paired.compare(draw(0, 2000), draw(1, 200), there, are_pairs=False)
    assert gap.gap < -1 and abs(gap.net) < gap.band and gap.within_noise
    assert "at equal numbers of images" in gap.sentence()


def test_too_few_images_have_no_band():
    gap = paired.compare(drawn(0, 3), drawn(1, 3), REFERENCE, are_pairs=True)
    assert (gap.band, gap.noise, gap.chance, gap.interval) == (None,) * 4
    assert gap.within_noise is None
    assert gap.sentence().startswith("Too few images for a noise band: FID ")


def test_swap_steps_add_up_to_the_gap():
    sets = [("A", drawn(0)), ("latents", drawn(1, shift=0.1)), ("B", drawn(2, shift=1))]
    other = Gaussian(np.zeros(WIDTH), np.eye(WIDTH))
    rows = paired.swap_steps(sets, REFERENCE, ("reference", sets[-1][1], other))
    assert [name for name, *_ in rows] == ["A", "latents", "B", "reference"]
    ends = (
        frechet_distance(Gaussian.of(sets[0][1]), REFERENCE),
        frechet_distance(Gaussian.of(sets[2][1]), other),
    )
    assert sum(step for *_, step in rows) == pytest.approx(ends[1] - ends[0], rel=1e-6)


def test_worst_pairs_come_first(tmp_path):
    rng = np.random.default_rng(0)
    a = rng.integers(0, 200, (300, 4, 4, 3)).astype(np.uint8)
    b = a.copy()
    b[290] += 50
    b[7, 0, 0, 0] += 40
    for name, images in (("a", a), ("b", b)):
        np.savez(tmp_path / name, arr_0=images)
    files = (ArrayFile(tmp_path / name) for name in ("a.npz", "b.npz"))
    worst, tiles = worst_pairs(*map(NpzImages, files), 2)
    assert [i for i, _ in worst] == [290, 7] and worst[0][1] == 50
    assert tiles.shape == (6, 4, 4, 3)
    np.testing.assert_array_equal(tiles[0], a[290])
    np.testing.assert_array_equal(tiles[4], b[7])
    assert (tiles[2] == 255).all() and tiles[5].max() == 255 * 40 // 50


def test_compare_refuses_other_features():
    with pytest.raises(UserError, match="5 features, where the reference has 6"):
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
    shifts = {"a": 0, "b": 0, "s0": 0, "s1": 0, "s2": 0, "mid": 0.1, "ref": 0.3}
    for i, (name, shift) in enumerate(shifts.items()):
        features = drawn(i, shift=shift).astype(np.float32)
        np.savez(path(name), features=features)
    sides = (path("a"), path("b"), "--reference", path("ref"), "--out")
    seeds = [word for name in ("s0", "s1", "s2") for word in ("--seeds", path(name))]
    swap = ("--swap", f"latents={path('mid')}")
    code, out, err = run(*sides, tmp_path / "r", *seeds, *swap)
    assert code == 0 and out.startswith("Within noise: FID "), err
    assert "Without two manifests the cause cannot be told." in out
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    fids = found["paired"]["fids"]
    steps = [row["step"] for row in found["swaps"]]
    assert sum(steps) == pytest.approx(fids[1] - fids[0], rel=1e-6)
    assert found["paired"]["seeds"] == 3 and found["paired"]["interval"] is None
    code, _, err = run(*sides, tmp_path / "r2", "--swap", "x")
    assert code == 2 and "NAME=FEATURES.npz" in err and not (tmp_path / "r2").exists()


def test_pairs_of_pictures_on_the_command_line(tmp_path, run):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 200, (10, 4, 4, 3)).astype(np.uint8)
    manifest = {"job": {"seed": 0, "labels": [1] * 10, "noise": None}}
    for name, shift in (("a", 0), ("b", 3)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images + np.uint8(shift))
        manifest["job"]["rounding"] = ("dit", "mdt")[shift > 0]
        text = json.dumps(manifest)
        (tmp_path / f"{name}.npz.manifest.json").write_text(text)
    sides = (tmp_path / "a.npz", tmp_path / "b.npz")
    code, out, err = run(*sides, "--out", tmp_path / "r")
    assert code == 0 and "Likeliest cause: rounding (" in out, err
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert len(found["worst"]) == 8 and found["worst"][0]["rms"] == 3
    picture = np.asarray(Image.open(tmp_path / "r" / "worst_pairs.png"))
    assert picture.shape == (8 * 66 + 2, 3 * 66 + 2, 3)
