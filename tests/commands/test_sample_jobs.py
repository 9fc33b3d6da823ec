"""sample.py's longer ways: going on after a kill, the same again, other answers."""

import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import small
from helpers.small import manifest

from sit_jax.diffusion import predictions
from sit_jax.experiment import build_experiment
from sit_jax.sampling import outputs
from sit_jax.sampling import run as sampling_run
from sit_jax.sampling.job import SamplingJob
from sit_jax.sampling.run import PartialResults

run = small.sample_run
weights = small.weights


def test_a_full_disk_is_noticed_before_anything_is_drawn(run, tmp_path, monkeypatch):
    """20 pictures of 4 x 4 bytes, twice: as batches, and in the output."""
    free = lambda path: SimpleNamespace(free=639)
    monkeypatch.setattr(shutil, "disk_usage", free)
    code, _, err = run("--num", "20", "--out", tmp_path / "x.npz")
    assert code == 2 and "free" in err and "needs 6.4e-07 GB" in err
    assert not list(tmp_path.iterdir())


def test_a_killed_run_draws_only_what_is_missing(run, tmp_path):
    """Of three batches one is whole on disk, and one can be told from a drawn one."""
    arguments, out = ("--num", "20", "--batch-size", "8"), tmp_path / "cut.npz"
    assert run(*arguments, "--out", tmp_path / "whole.npz")[0] == 0
    whole = np.load(tmp_path / "whole.npz")["arr_0"]
    digest = SamplingJob.from_json(manifest(tmp_path / "whole.npz")["job"], "").digest
    results = PartialResults(out, digest, writes=[out])
    stats = {"evaluations": np.full(8, 4), "finished": np.ones(8, bool)}
    results.save(0, {"images": whole[:8], **stats})
    results.save(1, {"images": np.zeros_like(whole[:8]), **stats})
    # other samples do not mix with it
    code, _, err = run(*arguments, "--seed", "1", "--out", out)
    assert code == 2 and "parts of other samples" in err and not out.exists()
    assert run(*arguments, "--out", out)[0] == 0
    images = np.load(out)["arr_0"]
    np.testing.assert_array_equal(images[8:16], 0)
    np.testing.assert_array_equal(
        np.delete(images, range(8, 16), 0), np.delete(whole, range(8, 16), 0)
    )
    assert not list(tmp_path.glob("*.parts"))


def test_one_batch_has_the_same_bytes_as_through_parts(run, tmp_path):
    arguments = ("--num", "8", "--batch-size", "8")
    direct, in_parts = (tmp_path / f"{n}.npz" for n in ("direct", "parts"))
    assert run(*arguments, "--out", direct)[0] == 0
    digest = SamplingJob.from_json(manifest(direct)["job"], "").digest
    PartialResults(in_parts, digest)
    assert run(*arguments, "--out", in_parts)[0] == 0
    assert direct.read_bytes() == in_parts.read_bytes()


@pytest.mark.parametrize(
    ("out", "module", "function", "calls"),
    [
        ("x.npz", sampling_run, "write_json", 0),
        ("x.png", sampling_run, "write_json", 0),
        ("x.png", outputs, "save_png", 0),
        ("x/", outputs, "save_png", 2),  # when two of the images are there
    ],
)
def test_a_kill_while_writing_needs_no_overwrite(
    run, tmp_path, monkeypatch, out, module, function, calls
):
    write, numbers = getattr(module, function), itertools.count()

    def killed(*arguments):
        if next(numbers) == calls:
            raise KeyboardInterrupt
        write(*arguments)

    arguments = ("--num", "4", "--out", f"{tmp_path}/{out}")
    with monkeypatch.context() as patch:
        patch.setattr(module, function, killed)
        assert run(*arguments)[0] == 130
    code, _, err = run(*arguments)
    assert code == 0, err
    assert not list(tmp_path.glob("*.parts"))


def test_the_same_again_from_the_manifest(run, tmp_path):
    first, again = tmp_path / "a.npz", tmp_path / "b.npz"
    how = ("--labels", "balanced", "--num", "7", "--seed", "3", "--guidance", "2.0")
    how += ("--guidance-interval", "0.2,0.7", "--sampler", "midpoint", "--steps", "3")
    assert run(*how, "--out", first)[0] == 0
    record = tmp_path / "a.npz.manifest.json"
    code, _, _ = run("--from-manifest", record, "--out", again, weights=None)
    assert code == 0 and first.read_bytes() == again.read_bytes()
    assert manifest(first)["job"] == manifest(again)["job"]


def test_other_weights_than_the_manifests_need_force(run, tmp_path):
    out, other = tmp_path / "a.npy", small.config()
    assert run("--num", "1", "--out", out)[0] == 0
    parts = build_experiment(other)
    from sit_jax.config import to_json

    small.save(
        tmp_path / "w",
        1,
        {"config": to_json(other), "step": 1},
        ema=small.random_params(parts, 77),
        params=small.random_params(parts, 78),
    )
    record = f"{out}.manifest.json"
    again = ("--from-manifest", record, "--out", tmp_path / "b.npy")
    code, _, err = run(*again, weights=tmp_path / "w")
    assert code == 2 and "other weights than the manifest's" in err
    assert not (tmp_path / "b.npy").exists()
    assert run(*again, "--force", weights=tmp_path / "w")[0] == 0
    assert not np.array_equal(np.load(out), np.load(tmp_path / "b.npy"))


def test_saved_noise_draws_the_same(run, tmp_path):
    labels = ("--labels", "0,1,2")
    kept = ("--save-noise", tmp_path / "z.npy")
    assert run(*labels, *kept, "--out", tmp_path / "a.npy")[0] == 0
    given = ("--noise", tmp_path / "z.npy")
    assert run(*labels, *given, "--out", tmp_path / "b.npy")[0] == 0
    np.testing.assert_array_equal(
        np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    )
    record = manifest(tmp_path / "b.npy")
    assert len(record["noise_sha256"]) == 64


def test_torchs_noise_reaches_the_steps(run, tmp_path):
    drawn = {}
    for seed, name in (("3", "euler"), ("4", "euler"), ("3", "euler-maruyama")):
        out = tmp_path / f"{seed}{name}.npy"
        how = ("--labels", "0,1", "--noise", f"torch:{seed}", "--sampler", name)
        assert run(*how, "--steps", "3", "--out", out)[0] == 0
        drawn[seed, name] = np.load(out)
    assert np.abs(drawn["3", "euler"] - drawn["4", "euler"]).max() > 0.1
    assert not np.allclose(drawn["3", "euler-maruyama"], drawn["3", "euler"], atol=0.1)


def test_a_trajectory_becomes_a_strip_and_an_animation(run, tmp_path):
    from PIL import Image

    out = tmp_path / "x.png"
    how = ("--sampler", "heun", "--steps", "6", "--trajectory", "3")
    assert run("--labels", "0,1", *how, "--out", out)[0] == 0
    with Image.open(out) as picture:
        assert picture.size == (2 + 3 * 66, 2 + 2 * 66)
    with Image.open(tmp_path / "x.gif") as moving:
        assert moving.n_frames == 3
    code, _, err = run("--labels", "0", *how, "--out", tmp_path / "x.npy")
    assert code == 2 and "--trajectory needs --out x.png" in err


def test_a_worse_network_leads_away(run, tmp_path, weights):
    for name, how in (
        ("same", ("--autoguidance", weights, "--guidance", "3")),
        ("none", ("--guidance", "1")),
    ):
        assert run("--labels", "1,2", *how, "--out", tmp_path / f"{name}.npy")[0] == 0
    # led away from itself, a network goes where it would have gone
    np.testing.assert_allclose(
        np.load(tmp_path / "same.npy"), np.load(tmp_path / "none.npy"), atol=1e-5
    )
    record = manifest(tmp_path / "same.npy")
    assert record["weak_sha256"] == record["weights_sha256"]


def test_a_worse_network_must_be_asked_the_same(run, tmp_path):
    config = small.config()
    config.process.prediction = predictions.noise
    other = small.checkpoint(tmp_path / "weak", config)
    how = ("--autoguidance", other, "--guidance", "3", "--out", tmp_path / "x.npy")
    code, _, err = run("--labels", "1", *how)
    assert code == 2 and not (tmp_path / "x.npy").exists()
    assert "Interpolant(path=linear, prediction=noise), where" in err


@pytest.mark.slow
def test_emulated_platforms_move_the_samples(run, tmp_path):
    drawn = {}
    for word in (None, "gpu-tf32", "tpu-default"):
        out = tmp_path / f"{word}.npy"
        how = ("--emulate", word) if word else ()
        code, said, _ = run("--labels", "1,2", *how, "--out", out)
        assert code == 0
        drawn[word] = np.load(out)
        assert f"the model's {[24, 11, 8][len(drawn) - 1]}" in said
    off = [np.abs(drawn[w] - drawn[None]).max() for w in ("gpu-tf32", "tpu-default")]
    assert 0 < off[0] < off[1] < 0.2


@pytest.mark.slow
def test_unfinished_images_are_marked(run, tmp_path):
    out = tmp_path / "x.npy"
    how = ("--sampler", "dopri5", "--step-control", "sample", "--rtol", "1e-7")
    code, said, _ = run(
        *how, "--num", "3", "--config.sampler.max_steps=2", "--out", out
    )
    assert code == 0 and "gave up before the end in 3 images (0, 1, 2)" in said
    assert manifest(out)["stats"]["unfinished"] == [0, 1, 2]


BAD = {
    "nothing": ([], "--weights PATH is needed", None),
    "preset": (["--preset", "sit"], "there are sit-paper-ode", None),
    "manifest": (["--from-manifest", "no.json"], "no manifest to read", None),
    "other than the manifest's": (
        ["--from-manifest", "no.json", "--seed", "3", "--guidance", "2"],
        "--seed, --guidance: --from-manifest makes the same samples again",
        None,
    ),
    "form": (
        ["--sampler", "euler-maruyama", "--diffusion-form", "sigmoid"],
        "--diffusion-form 'sigmoid' is unknown (did you mean sigma?); there are sigma",
        ...,
    ),
    "last step": (["--last-step", "Mean"], "--last-step Mean: --sampler heun", ...),
    "eta": (["--sampler", "ddim", "--eta", "2"], "--eta 2: a number from 0 to 1", None),
    "control": (
        ["--sampler", "dopri5", "--step-control", "image"],
        "there are global, sample, torchdiffeq",
        ...,
    ),
    "spacing": (["--sampler", "ddpm", "--respacing", "x"], "--respacing 'x'", ...),
    "interval": (["--guidance-interval", "0.5"], "two numbers LO,HI", ...),
    "backwards": (["--guidance-interval", "0.5,0.2"], "LO < HI in [0, 1]", ...),
    "channels": (["--guidance-channels", "some"], "3 or all", ...),
    "precision": (["--precision", "double"], "there are exact, fast, bf16", ...),
    "emulate": (["--emulate", "tpu"], "there are tpu-default, gpu-tf32", ...),
    "torch": (["--noise", "torch:x"], "torch:SEED with a whole number", ...),
    "rounding": (["--rounding", "up"], "dit or mdt", ...),
    "vae": (["--vae", "sd-vae-ft-mse"], "not on latents; leave out --vae", ...),
    "guided likelihood": (
        ["--likelihood", "--guidance", "2"],
        "a guided field is no model's density",
        ...,
    ),
    "likelihood of noise": (["--likelihood"], "likelihoods are of real data", ...),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(run, tmp_path, weights, name):
    arguments, said, where = BAD[name]
    out = tmp_path / ("x.csv" if "--likelihood" in arguments else "x.npy")
    place = weights if where is ... else where
    code, _, err = run(*arguments, "--out", out, weights=place)
    assert code == 2, err
    assert said in err and err.count("\n") == 1 and "Traceback" not in err
    assert not list(tmp_path.iterdir())
