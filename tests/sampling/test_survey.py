"""What the likelihood of a record rests on: its latent, and its dequantization."""

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.diffusion import rng
from sit_jax.models.codec import Latents
from sit_jax.sampling.survey import data_of_records, gaussian, uniform


def test_latent_of_a_record_does_not_depend_on_who_is_beside_it():
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
