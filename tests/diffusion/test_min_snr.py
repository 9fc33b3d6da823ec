"""Min-SNR weights: the same loss of the data, whatever a network predicts."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import quick_jit

from sit_jax.diffusion import predictions
from sit_jax.diffusion.gaussian import GaussianDiffusion, fixed_small
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.loss_weights import MinSnr, MinSnrHybridLoss, min_snr_weight
from sit_jax.diffusion.paths import VP, expand_dims_like, gvp, linear
from sit_jax.errors import UserError

RNG = np.random.default_rng(0)
DATA, NOISE, OFF = RNG.standard_normal((3, 5, 4, 4, 2)).astype(np.float32)
PREDICTS = ("velocity", "noise", "data", "score")


def data_loss(alpha, sigma, most=5.0):
    """min(snr, most) times the mean squared error of data that is OFF by OFF."""
    snr = np.asarray(alpha, float) ** 2 / np.asarray(sigma, float) ** 2
    return np.minimum(snr, most) * np.mean(OFF.astype(float) ** 2, axis=(1, 2, 3))


def outputs(path, predicts, x, t):
    """What a network says whose guess at the data is wrong by OFF, at x."""
    alpha, sigma = path(t)
    p, q = predicts.weights(path, t)
    data = DATA + OFF
    return p * data + q * (x - alpha * data) / sigma


@pytest.mark.parametrize("path", [linear, gvp, VP()], ids=["linear", "gvp", "vp"])
def test_all_predictions_of_an_interpolant_have_one_loss(path):
    t = jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])
    at = expand_dims_like(t, DATA)
    wanted = data_loss(*path(t))
    for name in PREDICTS:
        predicts = getattr(predictions, name)
        net = lambda x, t, predicts=predicts: outputs(path, predicts, x, at)
        process = Interpolant(path, predicts, MinSnr())
        loss = process.losses(net, DATA, NOISE, t)["loss"]
        # differences of float32 numbers about 10 times their difference
        np.testing.assert_allclose(loss, wanted, rtol=2e-4, err_msg=name)


@pytest.mark.parametrize("predicts", ["noise", "data", "score"])
def test_and_all_of_a_diffusion(predicts):
    process = GaussianDiffusion(
        prediction=getattr(predictions, predicts),
        variance=fixed_small,
        objective=MinSnrHybridLoss(3.0),
    )
    t = jnp.array([5, 100, 200, 400, 700])
    at = expand_dims_like(t, DATA)

    def net(x, t):
        alpha, sigma = process.path(at)
        p, q = process.target_weights(at)
        data = DATA + OFF
        return p * data + q * (x - alpha * data) / sigma

    loss = quick_jit(lambda: process.losses(net, DATA, NOISE, t))()["loss"]
    alpha, sigma = process.float64_path(np.asarray(t))
    np.testing.assert_allclose(loss, data_loss(alpha, sigma, 3.0), rtol=5e-3)


def test_the_published_forms():
    """min / snr for the noise, min for the data, min / (snr + 1) for v."""
    alpha_bar = GaussianDiffusion().alpha_bar[1:]
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    noise = min_snr_weight(alpha, sigma, 0.0, 1.0)
    np.testing.assert_allclose(
        noise[np.array([0, 50, 100, 130])], [5.0e-4, 0.155, 0.586, 1], rtol=2e-3
    )
    v = min_snr_weight(alpha, sigma, -sigma, alpha)
    np.testing.assert_allclose(
        v[np.array([200, 300, 500])], [0.656, 0.394, 0.078], rtol=5e-3
    )
    t = np.linspace(0.05, 0.95, 19)
    ours = MinSnr()(linear, predictions.velocity, jnp.asarray(t))
    wanted = (1 - t) ** 2 * np.minimum((t / (1 - t)) ** 2, 5)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)


def test_weights_are_finite_over_the_times_that_are_trained_on():
    for path in (linear, gvp, VP()):
        for name in PREDICTS:
            process = Interpolant(path, getattr(predictions, name), MinSnr())
            t = jnp.array(process.train_interval(), jnp.float32)
            assert np.isfinite(process.loss_weight(path, process.prediction, t)).all()


@pytest.mark.parametrize("make", [MinSnr, MinSnrHybridLoss])
def test_a_limit_that_is_not_positive_is_refused(make):
    with pytest.raises(UserError, match="most=0"):
        make(most=0)
