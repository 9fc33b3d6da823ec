"""Adapters written by version 0.1: a run of DoRA with a new class, a PEFT folder."""

import json

import jax
import numpy as np
import pytest
from helpers import ROOT, small
from helpers.recorded import relative

from sit_jax import checkpoint
from sit_jax.adapters.apply import apply_model
from sit_jax.adapters.weights import merge_adapters
from sit_jax.config import from_json
from sit_jax.convert.adapters import apply_adapters, open_adapter
from sit_jax.convert.open import CheckpointWeights, base_shapes, load_adapted
from sit_jax.experiment import build_experiment
from sit_jax.parallel.mesh import make_mesh

FOLDER = ROOT / "tests" / "data" / "old_version" / "lora"
SHA256 = json.loads((FOLDER / "sha256.json").read_text())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Has the bits of version 0.1, which did not compile the initialisation."""
    directory = tmp_path_factory.mktemp("base")
    return small.checkpoint(directory, small.config(), compiled=False)


def output(model, params, labels):
    with np.load(FOLDER / "outputs.npz") as file:
        x, t = file["x"], file["t"]
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p: apply_model(model, p, x, t, labels))(params)


def expected(name):
    with np.load(FOLDER / "outputs.npz") as file:
        return file[name], file["y"]


def test_old_run_of_adapters_loads_over_its_base(base):
    """By hash and by output; the base has moved since."""
    directory, step = checkpoint.find_step(FOLDER / "run")
    experiment = build_experiment(
        from_json(checkpoint.read_meta(directory, step)["config"])
    )
    params, record = load_adapted(
        experiment, make_mesh(), CheckpointWeights(directory, step), "ema", str(base)
    )
    assert record["sha256"] == SHA256["base"]
    adapter = open_adapter(
        f"{directory}/{step}", experiment.model, base_shapes(experiment)
    )
    assert adapter.sha256 == SHA256["run"] and adapter.new_classes == 1
    out, labels = expected("run")
    assert (
        relative(output(experiment.model, merge_adapters(params), labels), out) < 1e-6
    )


def test_old_peft_folder_loads(base):
    experiment = build_experiment(small.config())
    params = small.random_params(experiment, 10, compiled=False)
    words = [f"{FOLDER}/peft:0.5"]
    params, (record,) = apply_adapters(params, words, experiment.model, SHA256["base"])
    assert record["sha256"] == SHA256["peft"] and record["weight"] == 0.5
    out, labels = expected("peft")
    assert relative(output(experiment.model, params, labels - 1), out) < 1e-6
