"""sample.py's longer ways: going on after a kill, the same again, given noise."""

import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import small
from helpers.small import manifest
from PIL import Image

from sit_jax.checkpoint import read_meta
from sit_jax.diffusion import rng
from sit_jax.experiment import build_experiment
from sit_jax.sampling import outputs
from sit_jax.sampling import run as sampling_run
from sit_jax.sampling.job import SamplingJob
from sit_jax.sampling.partial_results import PartialResults


def test_full_disk_is_noticed_before_anything_is_drawn(run, tmp_path, monkeypatch):
    """20 pictures of 4 x 4 bytes, twice: as batches, and in the output."""
    free = lambda path: SimpleNamespace(free=639)
    monkeypatch.setattr(shutil, "disk_usage", free)
    code, _, err = run("--num", "20", "--out", tmp_path / "x.npz")
    assert code == 2 and "free" in err and "needs 6.4e-07 GB" in err
    assert not list(tmp_path.iterdir())


def test_killed_run_draws_only_what_is_missing(run, tmp_path):
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
        ("x.png", outputs, "save_png", 0),
        ("x/", outputs, "save_png", 2),  # when two of the images are there
    ],
)
def test_kill_while_writing_needs_no_overwrite(
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


def test_manifest_gives_the_same_samples_again(run, tmp_path):
    first, again = tmp_path / "a.npz", tmp_path / "b.npz"
    words = ("--labels", "balanced", "--num", "7", "--seed", "3", "--guidance", "2.0")
    words += ("--guidance-interval", "0.2,0.7", "--sampler", "midpoint", "--steps", "3")
    assert run(*words, "--out", first)[0] == 0
    record = tmp_path / "a.npz.manifest.json"
    code, _, _ = run("--from-manifest", record, "--out", again, weights=None)
    assert code == 0 and first.read_bytes() == again.read_bytes()
    assert manifest(first)["job"] == manifest(again)["job"]


def test_other_weights_than_the_manifests_need_force(run, draw, tmp_path, weights):
    data = draw("a", "--num", "1")
    params = small.random_params(build_experiment(small.config()), 77)
    small.save(tmp_path / "w", 1, read_meta(weights, 8), ema=params, params=params)
    words = ("--from-manifest", tmp_path / "a.npy.manifest.json")
    code, _, err = run(*words, "--out", tmp_path / "b.npy", weights=tmp_path / "w")
    assert code == 2 and "other weights than the manifest's" in err
    assert not (tmp_path / "b.npy").exists()
    assert not np.array_equal(
        data, draw("b", *words, "--force", weights=tmp_path / "w")
    )


def test_saved_noise_draws_the_same(draw, tmp_path):
    noise, labels = tmp_path / "z.npy", ("--labels", "0,1,2")
    data = draw("a", *labels, "--save-noise", noise)
    start = rng.initial_noise(rng.image_keys(0, np.arange(3)), (4, 4, 1))
    np.testing.assert_array_equal(np.load(noise), start)
    np.testing.assert_array_equal(data, draw("b", *labels, "--noise", noise))
    assert len(manifest(tmp_path / "b.npy")["noise_sha256"]) == 64


def test_noise_of_torch_reaches_the_steps(draw):
    drawn = {}
    for seed, name in (("3", "euler"), ("4", "euler"), ("3", "euler-maruyama")):
        words = ("--labels", "0,1", "--noise", f"torch:{seed}", "--sampler", name)
        drawn[seed, name] = draw(f"{seed}{name}", *words, "--steps", "3")
    assert np.abs(drawn["3", "euler"] - drawn["4", "euler"]).max() > 0.1
    assert not np.allclose(drawn["3", "euler-maruyama"], drawn["3", "euler"], atol=0.1)


def test_trajectory_becomes_a_strip_and_an_animation(run, tmp_path):
    words = ("--sampler", "heun", "--steps", "6", "--trajectory", "3", "--labels")
    assert run(*words, "0,1", "--out", tmp_path / "x.png")[0] == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (2 + 3 * 66, 2 + 2 * 66)
    with Image.open(tmp_path / "x.gif") as moving:
        assert moving.n_frames == 3


@pytest.mark.slow
def test_emulated_platforms_move_the_samples(draw):
    words = ("--labels", "1,2", "--emulate")
    exact = draw("exact", *words[:2])
    errors = [
        np.abs(draw(p, *words, p) - exact).max() for p in ("gpu-tf32", "tpu-default")
    ]
    assert 0 < errors[0] < errors[1] < 0.2


@pytest.mark.slow
def test_unfinished_images_are_marked(run, tmp_path):
    words = ("--sampler", "dopri5", "--step-control", "sample", "--rtol", "1e-7")
    words += ("--num", "3", "--config.sampler.max_steps=2", "--out", tmp_path / "x.npy")
    code, out, _ = run(*words)
    assert code == 0 and "gave up before the end in 3 images (0, 1, 2)" in out
    assert manifest(tmp_path / "x.npy")["stats"]["unfinished"] == [0, 1, 2]
