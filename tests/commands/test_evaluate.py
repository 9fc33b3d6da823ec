"""evaluate.py as it is used: its lines, JSON and statistics files.

A toy stands for the Inception network; test_inception.py has the real one.
"""

import json
import re

import numpy as np
import pytest
from helpers import toy_inception
from helpers.recorded import arrays, case
from helpers.toy_inception import (
    ENOUGH,
    direct,
    extractor,
    figures,
    images,
    npz,
    record,
    refused,
    toy,
    weights,
)
from PIL import Image

from sit_jax.data.sources import Digits
from sit_jax.errors import UserError
from sit_jax.evaluation import evaluate as evaluation
from sit_jax.evaluation.features import inception_pipeline
from sit_jax.evaluation.fid import Gaussian, frechet_distance
from sit_jax.evaluation.statistics import load_statistics

LABELS = np.random.default_rng(5).integers(0, 70, ENOUGH)
network, run, sides = toy_inception.network, toy_inception.run, toy_inception.sides


def test_five_lines_and_a_json(sides, run):
    code, out, err = run(sides[0], "--reference", sides[1])
    assert code == 0
    want = direct(images(ENOUGH), images(ENOUGH, 1, 200))
    # float32 features of batches of another size: rounding
    assert figures(out) == pytest.approx(want, rel=1e-4)
    assert f"{ENOUGH} images: not comparable with a published FID-50K" in out
    found = record(sides[0])
    assert list(found["figures"].values()) == figures(out)
    assert found["samples"]["images"] == found["reference"]["images"] == ENOUGH
    assert found["samples"]["pipeline"] == inception_pipeline(weights())
    assert found["environment"]["packages"]["jax"]


def test_adms_recorded_figures(tmp_path, run):
    golden, want = arrays("adm_eval"), case("adm_eval")["results"]
    flat = lambda x: x[..., :7].reshape(len(x), -1)
    for which in ("smp", "ref"):
        pool, rows = golden[which], len(golden[which])
        spatial = np.resize(flat(golden[f"spatial_{which}"]), (rows, 42))
        logits = pool @ golden["softmax_w"]
        np.savez(tmp_path / which, pool=pool, spatial=spatial, logits=logits)
    paths = ("--features", tmp_path / "smp.npz", "--reference", tmp_path / "ref.npz")
    code, out, _ = run(*paths, "--force")
    found = figures(out)
    assert code == 0
    assert found[0] == pytest.approx(
        want["inception_score_default_split5000"], rel=1e-6
    )
    assert found[1] == pytest.approx(want["fid"], rel=1e-6)
    assert found[3:] == [want["precision_f32"], want["recall_f32"]]


def test_a_folder_is_as_good_as_an_npz(tmp_path, run):
    ours, theirs = images(40), npz(tmp_path / "r.npz", images(50, 1, 200))
    (tmp_path / "s").mkdir()
    for i, image in enumerate(ours):
        Image.fromarray(image).save(tmp_path / "s" / f"{i:06d}.png")
    flags = ("--reference", theirs, "--force", "--batch-size", 16)
    _, one, _ = run(tmp_path / "s", *flags)
    _, other, _ = run(npz(tmp_path / "s.npz", ours), *flags)
    assert figures(one) == figures(other)
    assert (tmp_path / "s" / "evaluation.json").exists()


def test_adms_reference_gives_its_statistics(tmp_path, sides, run):
    """FID and sFID from the four arrays, precision and recall from the images."""
    rng = np.random.default_rng(0)
    mu, mu_s = rng.standard_normal(12), rng.standard_normal(6)
    known = {"mu": mu, "sigma": np.eye(12), "mu_s": mu_s, "sigma_s": 2 * np.eye(6)}
    reference = npz(tmp_path / "adm.npz", images(100, 1, 200), **known)
    code, out, _ = run(sides[0], "--reference", reference)
    assert code == 0
    assert (
        "adm.npz: FID from mu, sigma; sFID from mu_s, sigma_s; "
        "precision and recall from arr_0 (100 images)" in out
    )
    part = toy(weights().params, images(ENOUGH))
    found, want = figures(out), direct(images(ENOUGH), images(100, 1, 200))
    far = lambda a, mean, cov: frechet_distance(
        Gaussian.of(np.asarray(a)), Gaussian(mean, cov)
    )
    assert found[1] == pytest.approx(far(part["pool"], mu, np.eye(12)), rel=1e-4)
    assert found[2] == pytest.approx(
        far(part["spatial"], mu_s, 2 * np.eye(6)), rel=1e-4
    )
    assert found[3:] == pytest.approx(want[3:], abs=2 / ENOUGH)


def test_statistics_files_stand_for_their_images(tmp_path, sides, run):
    made = tmp_path / "ref.npz"
    code, out, _ = run("--stats", sides[1], "--out", made)
    assert (code, out) == (
        0,
        f"statistics of {ENOUGH} images, {ENOUGH} features of them {made}\n",
    )
    _, direct, _ = run(sides[0], "--reference", sides[1])
    _, out, _ = run(sides[0], "--reference", made, "--overwrite")
    assert figures(out) == pytest.approx(figures(direct), rel=1e-9)
    found = json.loads(str(np.load(made)["record"]))
    assert found["count"] == ENOUGH and found["pipeline"] == inception_pipeline(
        weights()
    )
    assert found["environment"]["platform"] == "cpu"


def test_kept_features_need_no_network(tmp_path, sides, run, network):
    kept, made = tmp_path / "f.npz", tmp_path / "ref.npz"
    _, first, _ = run(sides[0], "--reference", sides[1], "--save-features", kept)
    run("--stats", sides[1], "--out", made)
    network(None)
    code, again, _ = run("--features", kept, "--reference", made)
    assert code == 0
    assert figures(again) == pytest.approx(figures(first), rel=1e-9)


def test_the_kernel_distance_on_request(tmp_path, run):
    paths = npz(tmp_path / "s.npz", images(40)), npz(tmp_path / "r.npz", images(50, 1))
    code, out, _ = run(
        paths[0], "--reference", paths[1], "--metrics", "recall", "--kid"
    )
    found = record(paths[0])["figures"]
    assert code == 0 and f"KID: {found['kid']}" in out and "FID" not in out
    assert found["kid_subsets"] == [100, 40] and found["kid_std"] > 0


def test_other_features_have_a_distance_and_no_fid(tmp_path, run):
    for name, shift in (("a", 0.0), ("b", 0.1)):
        features = np.random.default_rng(0).standard_normal((ENOUGH, 7)) + shift
        np.savez(tmp_path / name, features=features)
    paths = ("--features", tmp_path / "a.npz", "--reference", tmp_path / "b.npz")
    code, out, _ = run(*paths, "--metrics", "fid")
    assert code == 0 and "FID" not in out
    distance = float(re.search(r"^Frechet distance: (.*)$", out, re.M)[1])
    assert distance == pytest.approx(7 * 0.1**2, rel=1e-6)


def test_an_interval_on_request(tmp_path, sides, run):
    flags = ("--reference", sides[1], "--metrics", "fid", "--bootstrap", 20)
    wide = {}
    for name, labels in {"decided": np.arange(ENOUGH) % 70, "random": LABELS}.items():
        samples = npz(tmp_path / f"{name}.npz", images(ENOUGH), arr_1=labels)
        _, out, _ = run(samples, *flags)
        found = record(samples)["figures"]
        low, high = found["interval"]
        assert low < found["fid"] < high
        assert found["interval_by_class"] == (name == "decided")
        how = "as they are" if name == "decided" else "drawn too"
        assert f"95 % of other samples, classes {how}: " in out
        wide[name] = high - low
    assert wide["decided"] != wide["random"]  # other images were drawn


def test_a_manifest_beside_the_samples_is_copied(sides, run):
    manifest = {"weights_sha256": "abc", "job": {"sampler": "heun", "labels": [0] * 99}}
    sides[0].with_name("s.npz.manifest.json").write_text(json.dumps(manifest))
    run(sides[0], "--reference", sides[1], "--metrics", "fid")
    found = record(sides[0])["samples"]["manifest"]
    assert found["weights_sha256"] == "abc"
    assert found["job"] == {"sampler": "heun", "labels": "99 values"}


def test_fid_during_training(tmp_path, sides, run):
    run("--stats", sides[1], "--out", tmp_path / "ref.npz")
    reference = load_statistics(tmp_path / "ref.npz")
    batches = np.array_split(images(ENOUGH), 9)  # of unequal lengths
    found = evaluation.fid_of_images(iter(batches), extractor(weights()), reference)
    assert found == pytest.approx(
        direct(images(ENOUGH), images(ENOUGH, 1, 200))[1], 1e-4
    )
    with pytest.raises(UserError, match="another pipeline"):
        evaluation.fid_of_images(batches, extractor(weights(1, False)), reference)
    with pytest.raises(UserError, match="FID of 1 images"):
        evaluation.fid_of_images([images(1)], extractor(weights()), reference)


def test_only_50000_images_are_comparable():
    said = lambda count: evaluation.figure_notes(count, ["fid"], {"fid": 2.0})
    assert said(50_000) == []
    assert said(10_000) == ["10000 images: not comparable with a published FID-50K"]
    assert evaluation.figure_notes(10_000, ["precision"], {"precision": 1.0}) == []


def test_digits_are_compared_with_real_ones(tmp_path, run):
    digits = Digits(train=False)
    wrong = (digits.labels + 1) % 10
    for name, labels, share in (("right", digits.labels, 0.978), ("wrong", wrong, 0.0)):
        path = npz(tmp_path / f"{name}.npz", digits.images, arr_1=labels)
        code, out, _ = run(path, "--network", "digits")
        values = record(path)["figures"]
        assert code == 0 and out.startswith("recognised as the digit asked for: ")
        assert values["samples_recognised"] == pytest.approx(share, abs=0.01)
        assert values["real_recognised"] == pytest.approx(0.978, abs=1e-3)
        assert abs(values["frechet_samples"]) < 1e-6 < values["frechet_real"]
    colour = npz(tmp_path / "x.npz", images(4), arr_1=np.arange(4))
    refused(run(colour, "--network", "digits"), "it must be uint8 .N, 8, 8, 1.")
