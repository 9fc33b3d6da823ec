"""sample.py from its command line: what it writes, from what, and what it says of it.

tests/commands/test_misuse.py has what it refuses.
"""

import shutil

import jax
import numpy as np
import pytest
from helpers import small
from helpers.recorded import FOLDER
from helpers.small import manifest
from PIL import Image

from sit_jax.cli import sample
from sit_jax.config import spec
from sit_jax.convert.checkpoint import open_torch_file
from sit_jax.diffusion import predictions, rng
from sit_jax.diffusion.guidance import PowerCosine
from sit_jax.experiment import build_experiment
from sit_jax.models.codec import Pixels, to_uint8_mdt
from sit_jax.parallel.mesh import make_mesh, replicated
from sit_jax.samplers.fixed_ode import FixedStepODE, euler
from sit_jax.sampling import presets
from sit_jax.sampling.batch_sampler import BatchSampler
from sit_jax.sampling.presets import Preset


def test_sample_writes_every_kind_of_output(run, tmp_path):
    words = ("--labels", "3,1", "--num", "6", "--out")
    code, out, _ = run(*words, tmp_path / "x.npz")
    assert code == 0 and "6 images, guided, 4 network evaluations each" in out
    with np.load(tmp_path / "x.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (6, 4, 4, 1) and images.dtype == np.uint8
    assert labels.tolist() == [3, 3, 3, 1, 1, 1]
    assert run(*words, tmp_path / "x.npy")[0] == 0
    data = np.load(tmp_path / "x.npy")
    assert data.shape == (6, 4, 4, 1) and data.dtype == np.float32
    rounded = np.clip(127.5 * data + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(rounded, images)
    assert run(*words, f"{tmp_path}/d/")[0] == 0
    assert len(list((tmp_path / "d").glob("*.png"))) == 6
    with Image.open(tmp_path / "d" / "000004.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), images[4, ..., 0])
    assert run(*words, tmp_path / "x.png")[0] == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width == 2 + 3 * 66 and picture.height == 2 + 2 * 66


def test_manifest_says_how_samples_were_made(run, tmp_path):
    arguments = ("--num", "2", "--seed", "5", "--sampler", "euler", "--steps", "3")
    assert run(*arguments, "--guidance", "1.5", "--out", tmp_path / "x.npy")[0] == 0
    record = manifest(tmp_path / "x.npy")
    job = record["job"]
    assert job["seed"] == 5 and job["config"]["guidance"] == 1.5
    assert job["config"]["sampler"]["method"] == {
        "name": "sit_jax.samplers.fixed_ode.euler"
    }
    assert record["stats"]["evaluations"] == {"min": 3, "mean": 3.0, "max": 3}
    assert record["stats"]["unfinished"] == [] and len(record["weights_sha256"]) == 64
    assert record["codec"] == {"kind": "Pixels", "rounding": "dit"}
    assert record["precision"]["model dot"] == 24
    keys = rng.image_keys(5, np.arange(2))
    assert job["labels"] == rng.sample_labels(keys, 5).tolist()


def test_guidance_sampler_seed_and_ema_all_act(draw):
    base = draw("base", "--labels", "0,1")
    np.testing.assert_array_equal(base, draw("again", "--labels", "0,1"))
    for change in (
        ["--guidance", "1"],
        ["--sampler", "euler"],
        ["--seed", "1"],
        ["--no-ema"],
        ["--config.sampler.steps=4"],
    ):
        changed = draw("".join(change), "--labels", "0,1", *change)
        assert np.abs(changed - base).max() > 1e-4, change


@pytest.mark.parametrize(
    "width, cases", [(16, [(1, 1), (2, 7), (8, 80)]), (128, [(1, 1), (1, 7)])]
)
def test_bytes_are_the_same_for_any_batch_size_and_number_of_devices(width, cases):
    """Narrow networks take four rows at a time, others two."""
    config = small.config(guidance=2.0)
    config.model.width = width
    experiment = build_experiment(config)
    params = small.random_params(experiment, 0)
    labels = np.asarray(rng.sample_labels(rng.image_keys(3, np.arange(40)), 5))

    def drawn(devices, batch_size):
        mesh = make_mesh(data=-1, fsdp=1, devices=jax.devices()[:devices])
        placed = jax.device_put(params, replicated(mesh))
        draw = BatchSampler(experiment, placed, mesh, batch_size)
        return np.concatenate([data for data, _ in draw(3, labels)])

    first = drawn(1, 32)
    assert np.unique(first.round(3), axis=0).shape == first.shape  # all different
    for devices, batch_size in cases:
        other = drawn(devices, batch_size)
        assert other.tobytes() == first.tobytes(), (devices, batch_size)


def test_torch_weights_are_sampled_as_their_checkpoint_is(run, draw, tmp_path):
    file = FOLDER / "weights" / "sit_a.pt"
    words = ["--labels", "1,9", "--sampler", "heun", "--steps", "2"]
    flags = ["--family", "sit", "--heads", "4"]
    data = draw("a", *words, *flags, weights=file)
    items, meta = open_torch_file(file, family="sit", heads=4).items()
    small.save(tmp_path / "ported", 0, meta, **items)
    assert data.shape == (2, 8, 8, 4) and np.isfinite(data).all()
    np.testing.assert_array_equal(data, draw("b", *words, weights=tmp_path / "ported"))
    code, _, err = run(*words, "--out", tmp_path / "c.npy", weights=file)
    assert code == 2 and "--family sit or --family dit" in err
    code, _, err = run(*words, *flags, "--out", tmp_path / "c.png", weights=file)
    assert code == 2 and "latents need a VAE" in err


@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 4, 4, 3), np.float32), "must be float32 (N, 4, 4, 1)"),
        (np.zeros((4, 4, 1), np.float32), "must be float32 (N, 4, 4, 1)"),
        (np.array([print], object), "Object arrays cannot"),
    ],
)
def test_noise_of_another_kind_is_refused(run, tmp_path, array, message):
    np.save(tmp_path / "noise.npy", array)
    code, _, err = run("--noise", tmp_path / "noise.npy", "--out", tmp_path / "x.npy")
    assert code == 2 and message in err


def test_config_changes_the_sampler_but_not_the_network(run, tmp_path):
    config = tmp_path / "other.py"
    config.write_text(
        "from helpers import small\ndef get_config():\n"
        "    c = small.config()\n    c.guidance = 7.0\n    return c\n"
    )
    out = tmp_path / "x.npy"
    assert run("--num", "1", "--config", config, "--out", out)[0] == 0
    assert manifest(out)["job"]["config"]["guidance"] == 7.0
    config.write_text(config.read_text().replace("guidance = 7.0", "model.depth = 3"))
    code, _, err = run("--num", "1", "--config", config, "--out", out, "--overwrite")
    assert code == 2 and "model.depth is 2, not 3" in err


def test_one_step_of_a_checkpoint_is_taken_by_its_folder(draw, weights):
    newest = draw("newest", "--labels", "0")
    np.testing.assert_array_equal(
        newest, draw("8", "--labels", "0", weights=weights / "8")
    )


def test_damaged_checkpoint_is_named_in_the_last_line(weights, tmp_path):
    shutil.copytree(weights, tmp_path / "w")
    for file in (tmp_path / "w" / "8" / "ema").rglob("*"):
        if file.is_file() and "d" in file.parent.name:  # the arrays' bytes
            file.write_bytes(file.read_bytes()[:10])
    arguments = ("--weights", tmp_path / "w", "--num", "1", "--out", tmp_path / "x.npy")
    end = small.script("sample.py", *arguments)  # what breaks off stays in no process
    assert end.returncode == 2, end.stderr
    # the reader's other threads may have complained before
    assert "is damaged" in end.stderr.splitlines()[-1]
    assert not (tmp_path / "x.npy").exists()


def test_overwrite_replaces_a_folder_whole(run, tmp_path):
    out = f"{tmp_path}/d/"
    assert run("--num", "3", "--out", out)[0] == 0
    assert run("--num", "1", "--out", out, "--overwrite")[0] == 0
    assert [path.name for path in (tmp_path / "d").glob("*.png")] == ["000000.png"]


# ---- where a flag is not given: the preset's value, or that of the weights ----


@pytest.fixture(scope="module")
def mdt_weights(tmp_path_factory):
    """A network whose run was guided and rounded as MDT's."""
    config = small.config(codec=spec(Pixels, rounding=to_uint8_mdt))
    with config.ignore_type():
        config.guidance = spec(PowerCosine, scale=3.0, power=4.0, steps=1)
        config.sampler = spec(FixedStepODE, method=euler, steps=2)
    return small.checkpoint(tmp_path_factory.mktemp("weights"), config)


@pytest.fixture
def job_of(call, mdt_weights, tmp_path):
    """Returns the job of the manifest that a command leaves."""

    def job_of(*arguments):
        out = tmp_path / "x.npz"
        words = ("--weights", mdt_weights, "--out", out, "--overwrite", *arguments)
        code, _, err = call(sample, *words)
        assert code == 0, err
        assert manifest(out)["codec"]["rounding"] == manifest(out)["job"]["rounding"]
        return manifest(out)["job"]

    return job_of


def test_guidance_and_rounding_default_to_those_of_the_weights(job_of):
    """A constant scale is another: for MDT that is not what --cfg-scale says there."""
    job = job_of("--labels", "1", "--guidance", 2)
    assert job["rounding"] == "mdt"
    guidance = job["config"]["guidance"]
    assert guidance["scale"] == 2.0 and guidance["power"] == 4.0
    job = job_of("--labels", "1", "--guidance", 1, "--rounding", "dit")
    assert job["rounding"] == "dit" and job["config"]["guidance"] == 1.0
    words = ("--labels", "1", "--guidance", 2, "--guidance-interval", "0,1")
    guidance = job_of(*words)["config"]["guidance"]
    assert guidance["make"]["name"].endswith("Interval") and guidance["scale"] == 2.0


def test_seed_of_0_is_not_that_of_the_preset(job_of, monkeypatch):
    preset = Preset(
        *("any", "a figure", "nobody"),
        sampler=spec(FixedStepODE, method=euler, steps=1),
        guidance=1.0,
        **dict(vae=None, labels="1", num=None, seed=4),
    )
    monkeypatch.setitem(presets.PRESETS, "own", lambda: preset)
    assert job_of("--preset", "own")["seed"] == 4
    assert job_of("--preset", "own", "--seed", "0")["seed"] == 0


# ---- autoguidance ----


def test_guiding_by_itself_changes_nothing(draw, weights, tmp_path):
    words = ("--autoguidance", weights, "--guidance", "3")
    same = draw("same", "--labels", "1,2", *words)
    none = draw("none", "--labels", "1,2", "--guidance", "1")
    np.testing.assert_allclose(same, none, atol=1e-5)
    record = manifest(tmp_path / "same.npy")
    assert record["weak_sha256"] == record["weights_sha256"]


def test_guiding_network_must_have_the_same_process(run, tmp_path):
    config = small.config()
    config.process.prediction = predictions.noise
    other = small.checkpoint(tmp_path / "weak", config)
    words = ("--autoguidance", other, "--guidance", "3", "--out", tmp_path / "x.npy")
    code, _, err = run("--labels", "1", *words)
    assert code == 2 and not (tmp_path / "x.npy").exists()
    assert "Interpolant(path=linear, prediction=noise), where" in err
