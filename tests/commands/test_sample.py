"""sample.py from its command line: what it writes, and what it refuses."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import small
from helpers.recorded import FOLDER

from sit_jax.convert.checkpoint import open_torch_file
from sit_jax.diffusion import rng
from sit_jax.experiment import build_experiment
from sit_jax.parallel.mesh import make_mesh, replicated
from sit_jax.recipes import published
from sit_jax.sampling.batch_sampler import BatchSampler

weights, run = small.weights, small.sample_run


def test_every_kind_of_output(run, tmp_path):
    from PIL import Image

    code, out, _ = run("--labels", "3,1", "--num", "6", "--out", tmp_path / "x.npz")
    assert code == 0 and "6 images, guided, 4 network evaluations each" in out
    with np.load(tmp_path / "x.npz") as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (6, 4, 4, 1) and images.dtype == np.uint8
    assert labels.tolist() == [3, 3, 3, 1, 1, 1]
    assert run("--labels", "3,1", "--num", "6", "--out", tmp_path / "x.npy")[0] == 0
    data = np.load(tmp_path / "x.npy")
    assert data.shape == (6, 4, 4, 1) and data.dtype == np.float32
    rounded = np.clip(127.5 * data + 128, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(rounded, images)
    assert run("--labels", "3,1", "--num", "6", "--out", f"{tmp_path}/d/")[0] == 0
    assert len(list((tmp_path / "d").glob("*.png"))) == 6
    with Image.open(tmp_path / "d" / "000004.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), images[4, ..., 0])
    assert run("--labels", "3,1", "--num", "6", "--out", tmp_path / "x.png")[0] == 0
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width == 2 + 3 * 66 and picture.height == 2 + 2 * 66


def test_manifest_says_how_it_was_made(run, weights, tmp_path):
    arguments = ("--num", "2", "--seed", "5", "--sampler", "euler", "--steps", "3")
    assert run(*arguments, "--guidance", "1.5", "--out", tmp_path / "x.npy")[0] == 0
    record = json.loads((tmp_path / "x.npy.manifest.json").read_text())
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


def test_guidance_sampler_seed_and_average_all_act(run, tmp_path):
    def drawn(name, *arguments):
        out = tmp_path / f"{name}.npy"
        assert run("--labels", "0,1", "--out", out, *arguments)[0] == 0
        return np.load(out)

    base = drawn("base")
    np.testing.assert_array_equal(base, drawn("again"))
    for change in (
        ["--guidance", "1"],
        ["--sampler", "euler"],
        ["--steps", "3"],
        ["--seed", "1"],
        ["--no-ema"],
        ["--config.sampler.steps=4"],
    ):
        assert np.abs(drawn("".join(change), *change) - base).max() > 1e-4, change


def test_given_noise_is_where_it_starts(run, tmp_path):
    keys = rng.image_keys(0, np.arange(3))
    np.save(tmp_path / "noise.npy", rng.initial_noise(keys, (4, 4, 1)))
    labels = ("--labels", "0,1,2", "--seed", "0")
    assert run(*labels, "--out", tmp_path / "a.npy")[0] == 0
    given = ("--noise", tmp_path / "noise.npy")
    assert run("--labels", "0,1,2", *given, "--out", tmp_path / "b.npy")[0] == 0
    np.testing.assert_array_equal(
        np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    )


def test_same_bytes_for_any_batch_size_and_number_of_devices():
    parts = build_experiment(small.config(guidance=2.0))
    params = small.random_params(parts, 0)
    labels = np.asarray(rng.sample_labels(rng.image_keys(3, np.arange(40)), 5))

    def drawn(devices, batch_size):
        mesh = make_mesh(data=-1, fsdp=1, devices=jax.devices()[:devices])
        held = jax.device_put(params, replicated(mesh))
        draw = BatchSampler(parts, held, mesh, batch_size)
        return np.concatenate([data for data, _ in draw(3, labels)])

    first = drawn(1, 32)
    assert np.unique(first.round(3), axis=0).shape == first.shape  # all different
    for devices, batch_size in ((1, 1), (1, 7), (2, 7), (4, 32), (8, 1), (8, 80)):
        other = drawn(devices, batch_size)
        assert other.tobytes() == first.tobytes(), (devices, batch_size)


def test_torch_weights_are_sampled_as_their_checkpoint_is(run, tmp_path):
    file = FOLDER / "weights" / "sit_a.pt"
    arguments = ["--labels", "1,9", "--sampler", "heun", "--steps", "2"]
    told = ["--family", "sit", "--heads", "4"]
    out = tmp_path / "a.npy"
    assert run(*arguments, *told, "--out", out, weights=file)[0] == 0
    items, meta = open_torch_file(file, published, family="sit", heads=4).items()
    small.save(tmp_path / "ported", 0, meta, **items)
    other = tmp_path / "b.npy"
    assert run(*arguments, "--out", other, weights=tmp_path / "ported")[0] == 0
    found = np.load(out)
    assert found.shape == (2, 8, 8, 4) and np.isfinite(found).all()
    np.testing.assert_array_equal(found, np.load(other))
    code, _, err = run(*arguments, "--out", tmp_path / "c.npy", weights=file)
    assert code == 2 and "--family sit or --family dit" in err
    code, _, err = run(*arguments, *told, "--out", tmp_path / "c.png", weights=file)
    assert code == 2 and "latents need a VAE" in err


BAD = {
    "label": (["--labels", "1,5"], "--labels: 5 is not a class; there are 0..4"),
    "null label": (["--labels", "-1"], "'-1': random, balanced"),
    "not a label": (["--labels", "cat"], "'cat': random, balanced, classes"),
    "uneven": (["--labels", "1,2", "--num", "3"], "3 is not divisible by the 2 labels"),
    "none": (["--num", "0"], "--num 0: a whole number of at least 1"),
    "sampler": (
        ["--sampler", "hein"],
        "'hein' is unknown (did you mean heun?); there are euler",
    ),
    "misfit": (["--sampler", "ddpm"], "DDPM"),
    "steps": (
        ["--sampler", "dopri5", "--steps", "9"],
        "--steps 9: --sampler dopri5 has no such setting; --sampler euler",
    ),
    "no steps": (["--steps", "0"], "--steps 0: a whole"),
    "negative rtol": (["--sampler", "dopri5", "--config.sampler.rtol=-1"], "rtol=-1"),
    "noise missing": (["--noise", "no.npy"], "no.npy"),
    "field": (["--config.sampler.stesp=3"], "did you mean 'steps'?"),
    "not finite": (["--guidance", "nan"], "--cfg-scale 'nan': a number"),
    "large seed": (["--seed", "-1"], "--seed -1: a whole number from 0"),
    "batch": (["--batch-size", "0"], "--batch-size 0"),
    "seed": (["--seed", "x"], "--seed 'x': a whole number"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(run, tmp_path, name):
    arguments, said = BAD[name]
    code, _, err = run(*arguments, "--out", tmp_path / "x.npy")
    assert code == 2
    assert said in err and err.count("\n") == 1 and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_outputs_that_exist_are_kept(run, tmp_path):
    out = tmp_path / "x.npy"
    out.write_text("precious")
    code, _, err = run("--num", "1", "--out", out)
    assert code == 2 and "--overwrite" in err and out.read_text() == "precious"
    assert run("--num", "1", "--out", out, "--overwrite")[0] == 0
    assert np.load(out).shape == (1, 4, 4, 1)
    assert run("--num", "1", "--out", tmp_path / "x.gif")[0] == 2


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (4, 4, 1)])
def test_noise_of_another_shape(run, tmp_path, shape):
    np.save(tmp_path / "noise.npy", np.zeros(shape, np.float32))
    code, _, err = run("--noise", tmp_path / "noise.npy", "--out", tmp_path / "x.npy")
    assert code == 2 and "must be float32 (N, 4, 4, 1)" in err


def test_noise_that_would_run_code(run, tmp_path):
    np.save(tmp_path / "noise.npy", np.array([print], object))
    code, _, err = run("--noise", tmp_path / "noise.npy", "--out", tmp_path / "x.npy")
    assert code == 2 and "holds Python objects" in err


def test_a_config_may_change_the_sampler_not_the_network(run, tmp_path):
    config = tmp_path / "other.py"
    config.write_text(
        "import small\ndef get_config():\n"
        "    c = small.config()\n    c.guidance = 7.0\n    return c\n"
    )
    out = tmp_path / "x.npy"
    assert run("--num", "1", "--config", config, "--out", out)[0] == 0
    record = json.loads((tmp_path / "x.npy.manifest.json").read_text())
    assert record["job"]["config"]["guidance"] == 7.0
    config.write_text(config.read_text().replace("guidance = 7.0", "model.depth = 3"))
    code, _, err = run("--num", "1", "--config", config, "--out", out, "--overwrite")
    assert code == 2 and "model.depth is 2, not 3" in err


def test_one_step_of_a_checkpoint(run, weights, tmp_path):
    drawn = []
    for name, place in (("a", weights), ("b", weights / "8")):
        out = tmp_path / f"{name}.npy"
        assert run("--labels", "0", "--out", out, weights=place)[0] == 0
        drawn.append(np.load(out))
    np.testing.assert_array_equal(*drawn)


def test_a_damaged_checkpoint_is_named_in_the_last_line(weights, tmp_path):
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


def test_a_folder_is_replaced_whole(run, tmp_path):
    out = f"{tmp_path}/d/"
    assert run("--num", "3", "--out", out)[0] == 0
    assert run("--num", "1", "--out", out, "--overwrite")[0] == 0
    assert [path.name for path in (tmp_path / "d").glob("*.png")] == ["000000.png"]


def test_weights_that_are_not_there(run, tmp_path):
    code, _, err = run("--num", "1", "--out", tmp_path / "x.npy", weights="nowhere")
    assert code == 2 and "no weights at nowhere" in err
    (tmp_path / "empty").mkdir()
    out = tmp_path / "x.npy"
    code, _, err = run("--num", "1", "--out", out, weights=tmp_path / "empty")
    assert code == 2 and "no checkpoint in" in err
