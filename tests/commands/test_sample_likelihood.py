"""sample.py --likelihood: of a data set, and what a record's figure rests on."""

import csv
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small

from sit_jax.config import spec
from sit_jax.data.sources import Digits
from sit_jax.diffusion import rng
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.models.codec import Latents
from sit_jax.models.dit import DiT
from sit_jax.samplers.ddpm import DDPM
from sit_jax.sampling.survey import data_of_records, gaussian, uniform

run = small.sample_run
weights = small.weights


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
    how = ("--likelihood", "--num", "5", "--sampler", "euler", "--steps", "2")
    code, said, _ = run(*how, "--out", out, weights=weights)
    assert code == 0 and "5 records, of pixels (8 x 8 x 1), by the density" in said
    rows, record = (
        table(out),
        json.loads((tmp_path / "x.csv.manifest.json").read_text()),
    )
    assert len({row["record"] for row in rows}) == 5
    nats = np.array([float(row["nats"]) for row in rows])
    bits = np.array([float(row["bits_per_dim"]) for row in rows])
    # a density of values in [-1, 1] counts bins that are 1 / 127.5 wide
    np.testing.assert_allclose(
        bits, -nats / (64 * np.log(2)) + np.log2(127.5), rtol=1e-5
    )
    np.testing.assert_allclose(record["nats"]["mean"], nats.mean(), rtol=1e-6)
    batches = ("--batch-size", "2", "--overwrite")
    assert run(*how, *batches, "--out", out, weights=weights)[0] == 0
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
    code, said, _ = run("--likelihood", "--num", "2", "--out", out, weights=weights)
    assert code == 0 and "by the variational bound" in said
    assert all(np.isfinite(float(row["bits_per_dim"])) for row in table(out))


def test_a_records_latent_does_not_depend_on_who_is_beside_it():
    """Nor on the size of the batch, and so the number of devices."""
    moments = np.random.default_rng(0).standard_normal((6, 2, 2, 8), np.float32)
    keys = rng.image_keys(0, np.arange(6))
    drawn = lambda rows: data_of_records(
        Latents(), keys[rows], {"moments": moments[rows]}, uniform
    )
    whole, none = drawn(slice(6))
    np.testing.assert_array_equal(whole[3:5], drawn(slice(3, 5))[0])
    assert none == 0.0 and whole.shape == (6, 2, 2, 4)
    assert len(np.unique(whole - whole.mean())) == whole.size


def test_dequantized_densities_know_their_noise():
    key, shape = jax.random.key(0), (4000, 2, 1, 1)
    flat, zero = uniform(key, shape)
    assert zero == 0.0 and float(jnp.abs(flat).max()) <= 0.5
    narrow, log_density = gaussian(key, shape)
    assert float(jnp.abs(narrow).max()) <= 0.5 and log_density.shape == (4000,)
    # a density of its own integrates to 1: the mean of 1/q over q is the volume
    np.testing.assert_allclose(np.exp(-log_density).mean(), 1.0, rtol=0.05)


def test_noise_of_directions_is_plus_and_minus_one():
    draw = rng.rademacher_probes(rng.image_keys(0, jnp.arange(3)), (8, 8, 1))
    first, second = draw(0), draw(1)
    assert set(np.unique(first)) == {-1.0, 1.0} and first.shape == (3, 8, 8, 1)
    assert not np.array_equal(first, second) and abs(float(first.mean())) < 0.3
