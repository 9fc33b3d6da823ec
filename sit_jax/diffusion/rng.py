"""Randomness of sampling: all of image i follows from (seed, i) and nothing else.

Neither the batch size nor the number of devices enters, so the same image comes out
of any machine. Labels, starting noise and the noise of each step have keys of their
own.
"""

import jax
import jax.numpy as jnp


def image_keys(seed, indices):
    """seed int, indices int [B] -> keys [B], one for each image."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)


def sample_labels(keys, classes):
    """keys [B] -> labels int32 [B], uniform over the classes."""
    draw = lambda key: jax.random.randint(jax.random.fold_in(key, 0), (), 0, classes)
    return jax.vmap(draw)(keys)


def initial_noise(keys, shape):
    """keys [B] -> starting noise [B, *shape]."""
    draw = lambda key: jax.random.normal(jax.random.fold_in(key, 1), shape)
    return jax.vmap(draw)(keys)


def step_noise(keys, shape):
    """keys [B] -> draw(i), the noise [B, *shape] of a sampler's step i."""

    def draw(i):
        one = lambda key: jax.random.normal(jax.random.fold_in(key, i), shape)
        return jax.vmap(one)(jax.vmap(jax.random.fold_in, (0, None))(keys, 2))

    return draw


def rademacher_probes(keys, shape):
    """keys [B] -> draw(i), the directions [B, *shape] of +-1 number i."""

    def draw(i):
        one = lambda key: jax.random.rademacher(
            jax.random.fold_in(key, i), shape, jnp.float32
        )
        return jax.vmap(one)(jax.vmap(jax.random.fold_in, (0, None))(keys, 3))

    return draw


def recorded_noise(recorded):
    """recorded [steps, B, ...] -> draw(i), for noise that comes from elsewhere."""
    return lambda i: jnp.asarray(recorded)[i]
