"""Weights for the commands, and sample.py called on them."""

import numpy as np
import pytest
from helpers import small

from sit_jax.cli import sample


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Returns a checkpoint directory of the run of small.py, to be read only."""
    return small.checkpoint(tmp_path_factory.mktemp("weights"), small.config())


@pytest.fixture
def run(call, weights):
    """Runs sample.py on those weights, or on others, or on none."""

    def run(*arguments, weights=weights):
        words = ("--weights", weights) if weights else ()
        return call(sample, *words, *arguments)

    return run


@pytest.fixture
def draw(run, tmp_path):
    """Draws to NAME.npy by sample.py; returns the array."""

    def draw(name, *arguments, **options):
        out = tmp_path / f"{name}.npy"
        code, _, err = run(*arguments, "--out", out, **options)
        assert code == 0, err
        return np.load(out)

    return draw
