"""What evaluate.py refuses: in one line, with nothing written."""

import numpy as np
import pytest
from helpers import toy_inception
from helpers.toy_inception import ENOUGH, images, npz, refused, weights

from sit_jax.errors import UserError
from sit_jax.evaluation import evaluate as evaluation
from sit_jax.evaluation.fid import Gaussian
from sit_jax.evaluation.statistics import FeatureStatistics

network, run, sides = toy_inception.network, toy_inception.run, toy_inception.sides


def test_few_images_need_force(tmp_path, sides, run):
    few = npz(tmp_path / "few.npz", images(204))
    refused(
        run(few, "--reference", sides[1]),
        r"few\.npz has 204 images; FID and sFID need 205 .*--force",
    )
    refused(run(sides[0], "--reference", few), r"few\.npz has 204 images")
    refused(run("--stats", few, "--out", tmp_path / "x.npz"), "few.npz has 204 images")
    code, out, _ = run(few, "--reference", sides[1], "--metrics", "precision,recall")
    assert code == 0 and "FID" not in out and "Recall: " in out
    assert run(few, "--reference", sides[1], "--force", "--overwrite")[0] == 0


def test_a_covariance_of_2048_features_needs_2048_images(monkeypatch):
    monkeypatch.undo()
    identity = Gaussian(np.zeros(2048), np.eye(2048))
    few, enough = (FeatureStatistics(count, identity) for count in (2047, 2048))
    with pytest.raises(
        UserError, match="x.npz has 2047 images; FID and sFID need 2048"
    ):
        evaluation.require_enough_images(["sfid"], "x.npz", few)
    evaluation.require_enough_images(["fid"], "x.npz", enough)
    evaluation.require_enough_images(["precision"], "x.npz", few)


def test_another_pipeline_needs_force(tmp_path, sides, run, network):
    made = tmp_path / "ref.npz"
    run("--stats", sides[1], "--out", made)
    network(weights(1, released=False))
    message = "made by another pipeline .*weights: 0000.* not 1111.*--force"
    refused(run(sides[0], "--reference", made), message)
    assert run(sides[0], "--reference", made, "--force")[0] == 0


def test_files_that_do_not_say_what_made_them_need_force(tmp_path, sides, run):
    """pytorch-fid's hold mu and sigma, and its resize is another one."""
    path = tmp_path / "fid.npz"
    np.savez(path, mu=np.zeros(12), sigma=np.eye(12))
    refused(run(sides[0], "--reference", path), "another pipeline .library unknown")
    code, out, _ = run(sides[0], "--reference", path, "--force")
    assert code == 0
    assert "lack what it takes: sFID, Precision, Recall" in out


@pytest.mark.parametrize(
    "reference, message",
    [
        ({"mu": np.zeros(9), "sigma": np.eye(9)}, "has 9 pool features.* have 12"),
        (
            {"mu": np.zeros(9), "sigma": np.eye(8)},
            r"mu \[9\] and sigma \[8, 8\] are no",
        ),
        ({"mu": np.zeros(9)}, "has no array sigma"),
        ({"mu": np.full(2, np.nan), "sigma": np.eye(2)}, "values that are no number"),
        (
            {"mu": np.zeros(2), "sigma": np.eye(2), "pool": np.ones((4, 3))},
            "different features",
        ),
        (
            {"features": np.ones((ENOUGH, 12))},
            "only one of .* of the Inception network",
        ),
    ],
    ids=["size", "shape", "half", "nan", "kept", "network"],
)
def test_references_that_do_not_fit_are_refused(
    tmp_path, sides, run, reference, message
):
    np.savez(tmp_path / "bad.npz", **reference)
    refused(run(sides[0], "--reference", tmp_path / "bad.npz"), message)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"arr_0": images(9).astype(np.float32)}, "float32.*; images are uint8"),
        (None, "is no .npz file, or ends too early"),
    ],
    ids=["floats", "truncated"],
)
def test_bad_samples_leave_nothing_behind(tmp_path, sides, run, content, message):
    path = tmp_path / "bad.npz"
    if content is None:
        path.write_bytes(sides[0].read_bytes()[:-9])
    else:
        np.savez(path, **content)
    before = sorted(tmp_path.rglob("*"))
    refused(run(path, "--reference", sides[1]), message)
    refused(run("--stats", path, "--out", tmp_path / "x.npz"), message)
    assert sorted(tmp_path.rglob("*")) == before


def test_damage_on_the_way_leaves_nothing_behind(tmp_path, sides, run):
    data = bytearray(sides[0].read_bytes())
    data[1000] ^= 255
    sides[0].write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    kept = ("--save-features", tmp_path / "f.npz")
    refused(run(sides[0], "--reference", sides[1], *kept), "arr_0 is damaged")
    refused(run("--stats", sides[0], "--out", tmp_path / "x.npz"), "arr_0 is damaged")
    assert sorted(tmp_path.rglob("*")) == before


def test_adms_reference_and_missing_weights(tmp_path, sides, run, network):
    """Other weights are refused; without any, stored features give what they can."""
    known = {"mu": np.zeros(12), "sigma": np.eye(12)}
    known |= {"mu_s": np.zeros(6), "sigma_s": np.eye(6)}
    reference = npz(tmp_path / "adm.npz", images(100), **known)
    kept = tmp_path / "f.npz"
    run(sides[0], "--reference", sides[1], "--save-features", kept)
    network(weights(0, released=False))
    message = "library guided-diffusion; weights: of the released graph"
    refused(run(sides[0], "--reference", reference, "--overwrite"), message)
    network(None)
    refused(run(sides[1], "--reference", sides[0]), "^script.py: no Inception weights")
    code, out, _ = run("--features", kept, "--reference", reference)
    assert code == 0 and "\nFID: " in out and "\nsFID: " in out
    assert "lack what it takes: Precision, Recall" in out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("", "name SAMPLES or --features"),
        ("s.npz --features f.npz", "name SAMPLES or --features"),
        ("s.npz", "--reference REF names"),
        ("s.npz --reference r.npz --metrics fid,mind", "no 'mind'; there"),
        ("s.npz --reference r.npz --bootstrap 3", "--bootstrap 3: a whole number"),
        ("s.npz --reference r.npz --config.x=1", "unknown argument .--config.x=1"),
        ("--stats s.npz", "--stats needs --out FILE.npz"),
        ("--stats s.npz --out x.json", "--stats needs --out FILE.npz"),
        ("--stats s.npz --out x.npz --reference r.npz", "--stats takes no samples"),
        ("none.npz --reference r.npz", "nothing at none.npz; name images"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, monkeypatch, run, arguments, message):
    monkeypatch.chdir(tmp_path)
    refused(run(*arguments.split()), message)
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path, sides, run):
    flags = ("--reference", sides[1], "--metrics", "fid")
    run(sides[0], *flags)
    refused(run(sides[0], *flags), r"s\.npz\.evaluation\.json exists; --overwrite")
    assert run(sides[0], *flags, "--overwrite")[0] == 0
    made = ("--stats", sides[0], "--out", sides[1])
    refused(run(*made), r"r\.npz exists; --overwrite")
    run("--stats", sides[0], "--out", tmp_path / "x.npz")
    refused(run("--stats", tmp_path / "x.npz", "--out", tmp_path / "y.npz"), "already")


def test_a_folder_that_cannot_be_written_is_refused_at_once(
    tmp_path, sides, run, network, monkeypatch
):
    network(None)  # which it would say, had it come so far
    free = lambda path, mode, **more: path != tmp_path / "locked"
    monkeypatch.setattr("os.access", free)
    (tmp_path / "locked").mkdir()
    found = run(sides[0], "--reference", sides[1], "--out", tmp_path / "locked" / "x")
    refused(found, r"locked is not writable; name another place")
