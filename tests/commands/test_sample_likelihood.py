"""sample.py --likelihood: of a data set."""

import csv

import numpy as np
import pytest
from helpers import small
from helpers.small import manifest

from sit_jax.config import spec
from sit_jax.data.sources import Digits
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.models.dit import DiT
from sit_jax.samplers.ddpm import DDPM


def digits(tmp_path, **fields):
    config = small.config(shape=(8, 8, 1), synthetic=False)
    for name, value in fields.items():
        config[name] = value
    config.source = spec(Digits)
    config.model.classes = 10
    return small.checkpoint(tmp_path / "digits", config)


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_likelihoods_of_a_data_set(run, tmp_path):
    weights, out = digits(tmp_path), tmp_path / "x.csv"
    words = ("--likelihood", "--num", "5", "--sampler", "euler", "--steps", "2")
    code, text, _ = run(*words, "--out", out, weights=weights)
    assert code == 0 and "5 records, of pixels (8 x 8 x 1), by the density" in text
    rows, record = table(out), manifest(out)
    assert len({row["record"] for row in rows}) == 5
    nats = np.array([float(row["nats"]) for row in rows])
    bits = np.array([float(row["bits_per_dim"]) for row in rows])
    # a density of values in [-1, 1] counts bins that are 1 / 127.5 wide
    np.testing.assert_allclose(
        bits, -nats / (64 * np.log(2)) + np.log2(127.5), rtol=1e-5
    )
    np.testing.assert_allclose(record["nats"]["mean"], nats.mean(), rtol=1e-6)
    batches = ("--batch-size", "2", "--overwrite")
    assert run(*words, *batches, "--out", out, weights=weights)[0] == 0
    again = [float(row["nats"]) for row in table(out)]
    np.testing.assert_allclose(again, nats, rtol=1e-4)


@pytest.mark.slow
def test_bounds_of_a_diffusion(run, tmp_path):
    weights = digits(
        tmp_path,
        model=spec(DiT, depth=1, width=16, heads=2, patch=2, classes=10),
        process=spec(GaussianDiffusion),
        sampler=spec(DDPM, steps=4),
    )
    out = tmp_path / "x.csv"
    code, text, _ = run("--likelihood", "--num", "2", "--out", out, weights=weights)
    assert code == 0 and "by the variational bound" in text
    assert all(np.isfinite(float(row["bits_per_dim"])) for row in table(out))
