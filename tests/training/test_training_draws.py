"""What a training step draws, and how its gradient becomes an update."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import small
from helpers.train_steps import TX, equal

from sit_jax.config import spec
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.models.codec import Latents
from sit_jax.training.state import TrainState
from sit_jax.training.step import make_train_step


def drawn(at=0, drop=0.1, seed=1, n=4096):
    """The draws of one step: data from the codec, noise, times, labels kept."""
    seen = {}

    def loss(net, data, noise, t):
        seen.update(data=data, noise=noise, t=t)
        return {"loss": jnp.mean(net(data, t), axis=(1, 2, 3))}

    def apply(variables, x, t, y):
        seen.update(y=y)
        return x * variables["params"]["w"]

    model = types.SimpleNamespace(classes=5, apply=apply)
    process = types.SimpleNamespace(
        sample_times=Interpolant().sample_times, losses=loss
    )
    state = TrainState.create({"w": jnp.ones(())}, TX).replace(step=jnp.int32(at))
    moments = np.zeros((n, 2, 2, 2), np.float32)  # mean 0, log variance 0
    label = np.arange(n, dtype=np.int32) % 5
    train_step = make_train_step(model, process, TX, label_dropout=drop)
    inputs = {"moments": moments, "label": label}
    train_step(state, Latents(scale=1.0), inputs, jax.random.key(seed))
    return jax.device_get(seen)


def test_data_noise_times_and_labels_are_drawn_independently():
    """Correlations of n independent pairs stay below 5 / sqrt(n)."""
    found = drawn()
    data, noise = found["data"].ravel(), found["noise"].ravel()
    assert abs(np.corrcoef(data, noise)[0, 1]) < 5 / data.size**0.5
    kinds = [found["data"][:, 0, 0, 0], found["noise"][:, 0, 0, 0], found["t"]]
    kinds += [found["y"] == 5, np.roll(found["t"], 1)]
    off_diagonal = np.corrcoef(np.stack(kinds).astype(float)) - np.eye(len(kinds))
    assert np.abs(off_diagonal).max() < 5 / len(found["t"]) ** 0.5
    for normal in (data, noise):
        assert abs(normal.mean()) < 0.04 and abs(normal.std() - 1) < 0.03
    assert abs(found["t"].mean() - 0.5) < 0.025


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_the_rate_at_which_labels_are_dropped(rate):
    y = drawn(drop=rate)["y"]
    spread = 5 * (rate * (1 - rate) / len(y)) ** 0.5
    assert abs(np.mean(y == 5) - rate) <= spread
    np.testing.assert_array_equal(y[y != 5], (np.arange(len(y)) % 5)[y != 5])


def test_the_same_step_draws_the_same_and_another_step_or_seed_others():
    first, again = drawn(at=3, n=64), drawn(at=3, n=64)
    assert equal(first, again)
    for other in (drawn(at=4, n=64), drawn(at=3, seed=2, n=64)):
        for name in ("data", "noise", "t"):
            assert not np.isin(first[name], other[name]).any(), name
        assert not np.array_equal(first["y"], other["y"])


@pytest.mark.parametrize("clip, length", [(None, 1.0), (3.0, 1.0), (0.2, 0.1)])
def test_the_gradient_is_clipped_to_its_global_norm_before_the_optimizer(clip, length):
    c, gradient = small.config(clip=clip), {"w": jnp.array([1.2, 1.6])}
    c.optimizer = spec(optax.sgd, learning_rate=0.5)
    tx = build_experiment(c, TRAINING).optimizer
    update, _ = tx.update(gradient, tx.init(gradient), gradient)
    assert float(optax.tree.norm(update)) == pytest.approx(length, rel=1e-5)
