"""Choosing the times to train on by their losses, and telling losses by time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from helpers.networks import quick_jit

from sit_jax.config import spec
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.timesteps import LossSecondMoment, quartile_means
from sit_jax.errors import UserError
from sit_jax.experiment import TRAINING, build_experiment

STEPS = 6
PROCESS = GaussianDiffusion().respace(STEPS)


class Released:
    """What guided-diffusion's resampler does, one loss after the other."""

    def __init__(self, history, uniform):
        self.history, self.uniform = history, uniform
        self.losses = [[] for _ in range(STEPS)]

    def add(self, t, loss):
        for i, value in zip(t, loss, strict=True):
            self.losses[i] = [*self.losses[i], value][-self.history :]

    def chances(self):
        if any(len(losses) < self.history for losses in self.losses):
            return np.full(STEPS, 1 / STEPS)
        size = np.sqrt(np.mean(np.square(self.losses), axis=1))
        return size / size.sum() * (1 - self.uniform) + self.uniform / STEPS


def test_the_chances_are_the_released_ones_after_every_batch():
    """Batches that hold a step more often than it is remembered among them."""
    ours, theirs = LossSecondMoment(3, 0.1), Released(3, 0.1)
    rng, state = np.random.default_rng(0), ours.init(PROCESS)
    add, chances = quick_jit(ours.update), quick_jit(ours.probabilities)
    uneven = 0
    for _ in range(12):
        t = np.minimum(rng.integers(STEPS + 3, size=8), STEPS - 1).astype(np.int32)
        loss = rng.exponential(size=8).astype(np.float32) * (1 + t)
        uneven += np.bincount(t).max() > 3
        state = add(state, t, loss)
        theirs.add(t, loss)
        np.testing.assert_allclose(chances(state), theirs.chances(), rtol=1e-5)
    assert uneven and np.ptp(theirs.chances()) > 0.05


def test_times_are_drawn_by_their_chances_and_weighted_back():
    """The weighted mean of anything estimates its uniform mean."""
    ours = LossSecondMoment(1, 0.1)
    size = jnp.arange(1.0, STEPS + 1)
    state = ours.update(ours.init(PROCESS), jnp.arange(STEPS), size)
    draw = quick_jit(lambda key: ours.sample(PROCESS, key, state, 5_000))
    t, weights = draw(jax.random.key(0))
    shares = np.bincount(t, minlength=STEPS) / len(t)
    np.testing.assert_allclose(shares, ours.probabilities(state), atol=0.02)
    assert float((weights * t).mean()) == pytest.approx(2.5, abs=0.1)
    assert float(t.mean()) > 2.9


def test_losses_are_told_by_quarter():
    t = jnp.array([0, 249, 250, 500, 999])
    found = quartile_means({"loss": jnp.array([1.0, 3.0, 5.0, 7.0, 9.0])}, t, 1000)
    assert [float(found[f"loss_q{i}"]) for i in range(4)] == [2, 5, 7, 9]
    found = quartile_means({"m": jnp.array([1.0, 2.0])}, jnp.array([0.1, 1.0]), 1)
    assert np.isnan(found["m_q1"]) and float(found["m_q3"]) == 2


@pytest.mark.parametrize(
    "fields", [dict(history=0), dict(uniform=1.5)], ids=["history", "uniform"]
)
def test_impossible_settings_are_named(fields):
    (value,) = fields.values()
    with pytest.raises(UserError, match=f"={value}"):
        LossSecondMoment(**fields)


def test_a_process_without_steps_is_refused():
    c = small.config()
    c.timesteps = spec(LossSecondMoment)
    with pytest.raises(
        UserError, match="needs a GaussianDiffusion; Interpolant has no steps"
    ):
        build_experiment(c, TRAINING)
