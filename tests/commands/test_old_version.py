"""A run that version 0.1 wrote: it goes on, and its weights and manifest are read."""

import json
import shutil

import numpy as np
import pytest
from helpers import ROOT, small

from sit_jax.checkpoint import find_step, read_meta
from sit_jax.cli import sample, train
from sit_jax.config import from_json, to_json
from sit_jax.experiment import TRAINING, build_experiment, fixed_differences

RUN = ROOT / "tests" / "data" / "old_version"
NEXT_LOSSES = {3: 1.5334452390670776, 4: 1.7127883434295654}  # as 0.1 went on


@pytest.fixture
def run(tmp_path):
    """A copy of the run, whose folder may be written to."""
    return shutil.copytree(RUN, tmp_path / "run")


def test_config_of_manifest_and_checkpoint_is_read():
    directory, step = find_step(RUN)
    for stored in (
        json.loads((RUN / "config.json").read_text()),
        json.loads((RUN / "manifest.json").read_text())["config"],
        read_meta(directory, step)["config"],
    ):
        experiment = build_experiment(from_json(stored), TRAINING)
        assert (experiment.model.width, experiment.sampler.steps) == (8, 2)
        assert fixed_differences(stored, to_json(from_json(stored))) == []


def test_run_goes_on_with_the_same_losses(run, call):
    words = ["--config", small.FILE, "--workdir", run, "--config.steps=4"]
    sizes = ["--config.model.width=8", "--config.model.depth=1", "--config.preview=0"]
    assert call(train, *words, *sizes)[0] == 0
    losses = small.losses(run)
    assert {step: losses[step] for step in NEXT_LOSSES} == pytest.approx(
        NEXT_LOSSES, rel=1e-6
    )


def test_weights_are_sampled(run, tmp_path, call):
    out = tmp_path / "samples.npy"
    assert call(sample, "--weights", run, "--labels", "1,2", "--out", out)[0] == 0
    np.testing.assert_allclose(np.load(out), np.load(RUN / "samples.npy"), atol=1e-5)
