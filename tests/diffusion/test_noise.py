"""Image i is made of (seed, i): no batch, no device and no neighbour enters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.diffusion import rng
from sit_jax.parallel.mesh import batch_sharding, make_mesh

SHAPE = (4, 4, 2)


@jax.jit
def drawn(seed, indices):
    """Everything random about some images; the last are the draws of steps 0 and 7."""
    keys = rng.image_keys(seed, indices)
    steps = jax.lax.map(rng.step_noise(keys, SHAPE), jnp.array([0, 7]))
    return rng.sample_labels(keys, 10), rng.initial_noise(keys, SHAPE), *steps


@pytest.fixture(scope="module")
def whole():
    return drawn(3, jnp.arange(32))


@pytest.mark.parametrize(
    "indices", [[0], [31], np.arange(7), [31, 0, 5, 5] * 8], ids=str
)
def test_batch_size_order_and_neighbours_do_not_enter(whole, indices):
    index = np.array(indices)
    for part, of_all in zip(drawn(3, index), whole, strict=True):
        np.testing.assert_array_equal(part, of_all[index])


def test_nor_do_devices(whole):
    index = jax.device_put(np.arange(32), batch_sharding(make_mesh(data=8)))
    split = drawn(3, index)
    assert len(split[1].sharding.device_set) == 8
    for part, of_all in zip(split, whole, strict=True):
        np.testing.assert_array_equal(part, of_all)


def test_a_step_s_noise_is_that_of_its_number_traced_or_not(whole):
    draw = rng.step_noise(rng.image_keys(3, jnp.arange(32)), SHAPE)
    np.testing.assert_array_equal(draw(7), whole[3])


def test_seeds_images_and_uses_are_independent_normal_draws():
    """10,000 numbers: correlations of independent draws stay below 5 / sqrt(n)."""
    shape = (100, 1, 1)

    @jax.jit
    def of_seed(seed):
        keys = rng.image_keys(seed, jnp.arange(100))
        step = rng.step_noise(keys, shape)
        return [rng.initial_noise(keys, shape), *jax.lax.map(step, jnp.arange(3))]

    draws = of_seed(0) + of_seed(1)
    draws += [jnp.roll(draws[0], 1, axis=0)]  # image i beside image i + 1
    flat = np.stack([np.ravel(draw) for draw in draws])
    matrix = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(matrix).max() < 0.05
    np.testing.assert_allclose(flat.mean(1), 0, atol=0.05)
    np.testing.assert_allclose(flat.std(1), 1, atol=0.05)


def test_labels_are_uniform_and_tell_nothing_of_the_noise():
    keys = rng.image_keys(0, jnp.arange(4000))
    labels = rng.sample_labels(keys, 4)
    counts = np.bincount(labels, minlength=4)
    assert labels.dtype == jnp.int32 and len(counts) == 4
    np.testing.assert_allclose(counts, 1000, atol=140)  # 5 standard deviations
    start = rng.initial_noise(keys, (1,))[:, 0]
    assert abs(np.corrcoef(labels, start)[0, 1]) < 0.08


def test_given_noise_is_handed_out_step_by_step():
    recorded = np.arange(24.0, dtype=np.float32).reshape(3, 2, 4)
    draw = rng.recorded_noise(recorded)
    np.testing.assert_array_equal(draw(1), recorded[1])
    np.testing.assert_array_equal(jax.jit(draw)(2), recorded[2])
