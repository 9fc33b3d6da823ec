"""A stranger's config, in weights, manifest and adapter: nothing that it names runs."""

import json
import sys
from importlib import import_module

import numpy as np
import pytest
from helpers import small

from sit_jax.cli import sample
from sit_jax.config import ROLES, from_json, to_json
from sit_jax.data import archives
from sit_jax.data.sources import Synthetic
from sit_jax.errors import UserError
from sit_jax.experiment import SAMPLING, build_experiment, validate
from sit_jax.parallel.mesh import make_mesh

TFDS = {"make": {"name": "sit_jax.data.archives.Tfds"}, "dataset": "stranger:x"}
IMPORTED = {"make": {"name": "stranger.Evil"}}
CALLED = {"make": {"name": "subprocess.getoutput"}, "cmd": "touch ran"}
WRITER = {"make": {"name": "sit_jax.sampling.outputs.assemble"}, "out": "ran"}
FOREIGN = [TFDS, IMPORTED, CALLED, WRITER]
UNNEEDED = [role for role in ROLES if role not in SAMPLING]


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """A folder to run in, where anything that ran would leave a trace."""
    (tmp_path / "stranger.py").write_text("open('ran', 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    make = lambda *fields, **more: (tmp_path / "ran").touch()
    monkeypatch.setattr(archives.Tfds, "__init__", make)
    yield tmp_path
    assert not (tmp_path / "ran").exists() and "stranger" not in sys.modules


def save_weights(folder, roles, foreign, **meta):
    """Saves a checkpoint whose config has a foreign object for these roles."""
    stored = {**to_json(small.config()), **dict.fromkeys(roles, foreign)}
    params = small.random_params(build_experiment(small.config()), 0)
    about = {"config": stored, "step": 8, **meta}
    small.save(folder, 8, about, params=params, ema=params)
    return stored


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda f: f["make"]["name"])
@pytest.mark.parametrize("role", ROLES)
def test_foreign_constructor_is_refused_where_it_is_needed(role, foreign, watched):
    config = from_json({**to_json(small.config()), role: foreign})
    if role in SAMPLING:
        with pytest.raises(UserError, match=f"may not stand for the role {role}"):
            build_experiment(config)
    else:
        assert build_experiment(config) == build_experiment(small.config())
        with pytest.raises(UserError, match=f"may not stand for the role {role}"):
            build_experiment(config, (role,))


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda f: f["make"]["name"])
def test_foreign_value_inside_a_part_is_refused(foreign, watched):
    stored = to_json(small.config())
    for role, field in (
        ("process", "path"),
        ("sampler", "method"),
        ("codec", "rounding"),
    ):
        part = {**stored[role], field: foreign}
        with pytest.raises(UserError, match=f"may not stand for the role {role}"):
            build_experiment(from_json({**stored, role: part}))


def test_commands_end_in_a_line(watched, call):
    save_weights("evil", ["model", "source"], TFDS)
    save_weights("good", [], TFDS)
    save_weights(
        "adapter", ["model"], TFDS, base={"path": "good", "step": 8, "sha256": "0"}
    )
    job = {"weights": "good", "config": {**to_json(small.config()), "sampler": TFDS}}
    job |= {"labels": [1], "item": "ema", "family": None, "heads": None, "seed": 0}
    job |= {"noise": None, "batch_size": 1, "weak": None, "vae": None}
    job |= {"rounding": "dit", "emulate": None}
    (watched / "manifest.json").write_text(json.dumps({"job": job}))
    for script, *words in [
        ("sample", "--weights", "evil", "--labels", "1", "--out", "x.png"),
        ("sample", "--from-manifest", "manifest.json", "--out", "x.png"),
        ("sample", "--weights", "good", "--lora", "adapter", "--out", "x.png"),
        ("sample", "--weights", "good", "--autoguidance", "evil", "--out", "x.png"),
        ("port_weights", "evil", "x.pt"),
        ("quantize", "evil", "x"),
        ("train", "--config", small.FILE, "--init", "evil", "--workdir", "x"),
    ]:
        code, _, err = call(import_module(f"sit_jax.cli.{script}"), *words)
        assert code == 2 and "archives.Tfds', which may not stand for" in err, err
        assert not list(watched.glob("x*"))


def test_likelihood_builds_no_source_that_runs_code(watched, call):
    save_weights("run", ["source"], TFDS)
    words = ["--weights", "run", "--likelihood", "--config.synthetic=False"]
    code, _, err = call(sample, *words, "--out", "x.csv")
    assert code == 2 and "name it in a --config FILE of your own" in err, err


def test_samples_are_drawn_without_the_parts_of_training(watched, call):
    save_weights("run", UNNEEDED, TFDS)
    words = ["--weights", "run", "--labels", "1", "--out", "y.npy"]
    assert call(sample, *words)[0] == 0
    assert np.load(watched / "y.npy").shape == (1, 4, 4, 1)


def test_config_that_could_not_be_sampled_is_refused_before_step_1():
    source = Synthetic((4, 4, 1), 5)
    c = small.config()
    c.process.path = lambda t: (t, 1 - t)
    experiment = build_experiment(c, ("model", "codec"))
    with pytest.raises(UserError, match="has no name; define it in a module"):
        validate(c, experiment, source, make_mesh())
    c.process.path = own_path
    with pytest.raises(UserError, match="could not be sampled: .*own_path'"):
        validate(c, experiment, source, make_mesh())


def own_path(t):
    return t, 1 - t


def test_shape_too_large_for_memory_is_refused_before_it_is_made():
    stored = to_json(small.config())
    with pytest.raises(UserError, match="is too large"):
        build_experiment(from_json({**stored, "shape": [2**20, 2**20, 1]}))
