"""Random numbers of training (StepKeys) and of sampling (a key for each image).

All of a training step follows from (seed, step). All of image i follows from (seed, i):
neither the batch size nor the number of devices enters, so the same image comes out of
any machine. Labels, initial noise and the noise of each step have keys of their own.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sit_jax.typing import Keys, Labels, StepNoise


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("codec", "labels", "times", "noise", "mask", "dropout"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class StepKeys:
    """The random keys of one training step, by what they are for.

    Recorded runs depend on how they are derived: first split in four, then fold in 4
    and 5, which the split does not use.
    """

    codec: Key[Array, ""]  # sampling of a VAE's posterior
    labels: Key[Array, ""]  # which labels are dropped
    times: Key[Array, ""]
    noise: Key[Array, ""]
    mask: Key[Array, ""]  # which tokens MDT hides
    dropout: Key[Array, ""]  # of adapters

    @classmethod
    def at(cls, key: Key[Array, ""], step: Int[Array, ""]) -> "StepKeys":
        """Returns the keys of a step of the run with this key."""
        key = jax.random.fold_in(key, step)
        codec, labels, times, noise = jax.random.split(key, 4)
        return cls(
            codec=codec,
            labels=labels,
            times=times,
            noise=noise,
            mask=jax.random.fold_in(key, 4),
            dropout=jax.random.fold_in(key, 5),
        )


def image_keys(seed: int, indices: Any) -> Keys:
    """Returns one key for each image number in indices [b]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), indices)


def sample_labels(keys: Keys, num_classes: int) -> Labels:
    """Returns labels int32 [b], uniform over the classes."""
    draw = lambda key: jax.random.randint(key, (), 0, num_classes)
    return jax.vmap(draw)(_fold_in(keys, 0))


def initial_noise(keys: Keys, shape: tuple[int, ...]) -> Float[Array, "b ..."]:
    """Returns the noise [b, *shape] that sampling starts from."""
    draw = lambda key: jax.random.normal(key, shape)
    return jax.vmap(draw)(_fold_in(keys, 1))


def step_noise(keys: Keys, shape: tuple[int, ...]) -> StepNoise:
    """Returns a function i -> the noise [b, *shape] of a sampler's step i."""
    return _numbered_draws(keys, 2, partial(jax.random.normal, shape=shape))


def rademacher_probes(keys: Keys, shape: tuple[int, ...]) -> StepNoise:
    """Returns a function i -> the directions [b, *shape] of +-1 number i."""
    draw = partial(jax.random.rademacher, shape=shape, dtype=jnp.float32)
    return _numbered_draws(keys, 3, draw)


def recorded_noise(recorded: Float[Array, "steps b ..."]) -> StepNoise:
    """Returns a function i -> row i, for noise that comes from elsewhere."""
    return lambda i: jnp.asarray(recorded)[i]


def _fold_in(keys: Keys, data: Any) -> Keys:
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def _numbered_draws(keys: Keys, purpose: int, draw: Callable) -> StepNoise:
    return lambda i: jax.vmap(draw)(_fold_in(_fold_in(keys, purpose), i))
