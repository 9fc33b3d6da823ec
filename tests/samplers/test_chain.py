"""DDPM's and DDIM's chains where the answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.diffusions import SMALL, gaussian, normal, sample, truthful, watched

from sit_jax.diffusion import predictions
from sit_jax.diffusion.gaussian import GaussianDiffusion, fixed_large, fixed_small
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.errors import UserError
from sit_jax.samplers.ddpm import DDIM, DDPM


def test_there_and_back_again():
    """A perfect network of Gaussian data leads data to noise and the noise to them."""
    data = 0.5 * jax.random.normal(jax.random.key(0), (2, 2, 2, 1))

    def net(x, t):
        alpha, sigma = SMALL.path(t[:, None, None, None])
        return sigma * x / (0.25 * alpha**2 + sigma**2)

    noise = DDIM(500, reverse=True)(net, SMALL, data).data
    assert abs(float(jnp.std(noise)) / float(jnp.std(data)) - 2) < 0.05
    again = DDIM(500)(net, SMALL, noise).data
    # a step errs by its size; the last one ends at data
    np.testing.assert_allclose(again, data, atol=0.05)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_classifier_leads(name):
    """The mean moves by the variance times the gradient, ddim's noise by sigma."""
    process = SMALL.respace(2)
    x = jax.random.normal(jax.random.key(1), (2, 2, 2, 1))
    told = []

    def lead(x, t):
        told.append(t.tolist())
        return 50 * jnp.ones_like(x)

    net = lambda x, t: 0.3 * x
    still = lambda i: jnp.zeros_like(x)
    make = {"ddpm": DDPM, "ddim": DDIM}[name]
    with jax.disable_jit():
        moved = make(2, cond_fn=lead)(net, SMALL, x, still).data
        told_steps = told[0][0], told[1][0]
        plain = make(2)(net, SMALL, x, still).data
    assert told_steps == (999, 0)
    at = lambda t: jnp.full(2, t)
    y = x
    for t in (1, 0):
        mean, log_var, guess = process.posterior(net, y, at(t))
        (alpha_, alpha), (sigma_, sigma) = process.float64_path(np.array([t - 1, t]))
        if name == "ddpm":
            y = mean + 50 * jnp.exp(log_var)
        else:
            eps = (y - alpha * guess) / sigma - 50 * sigma
            y = alpha_ * (y - sigma * eps) / alpha + sigma_ * eps
    np.testing.assert_allclose(moved, y, rtol=1e-5, atol=1e-4)
    assert np.abs(moved - plain).max() > 1e-3


@pytest.mark.parametrize("make", [DDPM, DDIM])
def test_guesses_are_mended_before_they_are_clipped(make):
    net = lambda x, t: 0.3 * x
    start, still = 3 * jnp.ones((1, 2, 2, 1)), lambda i: 0.0
    data = make(2, denoised_fn=lambda d: 0 * d + 0.25)(net, SMALL, start, still).data
    np.testing.assert_allclose(data, 0.25, rtol=1e-5)
    data = make(2, clip=True, denoised_fn=lambda d: 9 + 0 * d)(
        net, SMALL, start, still
    ).data
    np.testing.assert_allclose(data, 1.0, rtol=1e-5)


def test_states_kept_on_the_way():
    net = lambda x, t: 0.3 * x
    start = jnp.ones((2, 2, 2, 1))
    result = DDIM(9, trajectory_length=3)(net, SMALL, start)
    data, stats = result.data, result.stats()
    assert stats["trajectory"].shape == (3, 2, 2, 2, 1)
    np.testing.assert_array_equal(stats["trajectory"][-1], data)


@pytest.mark.parametrize(
    "sampler", [DDPM(20), DDPM(1000), DDIM(20), DDIM(20, eta=1.0), DDIM(1)]
)
def test_truth_leads_to_the_data(sampler):
    data, noise = normal(0, 2, 3, 2, 2, 4)
    found = sample(sampler, SMALL, truthful(data), noise, normal(1, 1000, 3, 2, 2, 4))
    np.testing.assert_allclose(found, data, atol=1e-5)


def test_ddim_keeps_the_noise_it_started_with():
    """eta = 0 and the truth: every state mixes the same data and the same noise."""
    data, noise = normal(0, 2, 3, 2, 2, 4)
    process = SMALL.respace(10)
    alpha, sigma = process.float64_path(np.arange(10))
    states = []
    net = watched(truthful(data), states)
    start = alpha[-1] * data + sigma[-1] * noise
    jax.jit(lambda x: DDIM(10)(net, SMALL, x))(start)
    jax.effects_barrier()
    for x, a, s in zip(states, alpha[::-1], sigma[::-1], strict=True):
        np.testing.assert_allclose(x, a * data + s * noise, atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_weights_keep_the_levels(eta):
    """Data and noise in the next state are as the next index wants them."""
    for process in (SMALL, SMALL.respace(10)):
        t = np.arange(len(process.betas))
        (alpha_, sigma_), (alpha, sigma) = (
            process.float64_path(t - 1),
            process.float64_path(t),
        )
        on_data, on_x, std = DDIM(eta=eta).weights(process)
        np.testing.assert_allclose(on_data + on_x * alpha, alpha_, rtol=1e-12)
        held = (on_x * sigma) ** 2 + std**2
        np.testing.assert_allclose(held, sigma_**2, rtol=1e-12)
        assert std[0] == 0 and np.any(std) == (eta > 0)


def test_ddim_with_eta_one_is_ddpm():
    """Same variance and same mean as the chain with the true step's variance."""
    process = SMALL.respace(10)
    on_data, on_x, std = DDIM(eta=1.0).weights(process)
    np.testing.assert_allclose(std**2, process.q_posterior[2], rtol=1e-12)
    np.testing.assert_allclose(on_data, process.q_posterior[0], rtol=1e-12)
    np.testing.assert_allclose(on_x, process.q_posterior[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sampler", [DDPM(250), DDIM(250), DDIM(250, eta=1.0)])
def test_samples_of_a_gaussian(sampler):
    process = GaussianDiffusion(variance=fixed_large)
    net = gaussian(0.7, 0.4, process)
    kicks, noise = normal(2, 250, 2000, 1, 1, 4), normal(3, 2000, 1, 1, 4)
    data = sample(sampler, process, net, noise, kicks)
    # 8000 numbers: standard errors 0.005 and 0.003, and 250 steps are 3 % off in width
    np.testing.assert_allclose(jnp.mean(data), 0.7, atol=0.015)
    np.testing.assert_allclose(jnp.std(data), 0.4, atol=0.02)


def test_noise_is_drawn_in_the_order_of_the_steps():
    """draw(0) leaves the noisiest index, draw(1) the next; the last one is masked."""
    process, silent = SMALL.respace(3), lambda x, t: jnp.zeros_like(x)
    zero = jnp.zeros((1, 1, 1, 1))
    ends = [
        DDPM(3)(silent, SMALL, zero, lambda i, k=k: zero + (i == k)).data
        for k in range(3)
    ]
    # each step is linear in x; with no noise seen, the data guess is x / alpha
    (alpha, _), (on_data, on_x, var) = (
        process.float64_path(np.arange(3)),
        process.q_posterior,
    )
    pull = on_data / alpha + on_x
    exact = [np.sqrt(var[2]) * pull[1] * pull[0], np.sqrt(var[1]) * pull[0], 0.0]
    np.testing.assert_allclose(np.ravel(ends), exact, rtol=1e-5)


def test_ddim_without_eta_draws_nothing():
    def draw(i):
        raise AssertionError("drawn")

    noise = jnp.ones((2, 2, 2, 4))
    result = DDIM(5)(truthful(noise), SMALL, noise, draw)
    data, stats = result.data, result.stats()
    assert data.shape == noise.shape
    assert stats["evaluations"] == 5 and stats["evaluations"].dtype == jnp.int32


def test_network_sees_original_steps():
    told = []

    def net(x, t):
        jax.debug.callback(lambda t: told.append(t.tolist()), t, ordered=True)
        return jnp.zeros_like(x)

    DDIM((2, 1))(net, SMALL, jnp.ones((2, 1, 1, 4)))
    jax.effects_barrier()
    assert told == [[500, 500], [499, 499], [0, 0]]


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: DDPM(0), "steps="),
        (lambda: DDIM(2.5), "steps="),
        (lambda: DDIM("50"), "steps="),
        (lambda: DDPM((0, 0)), "steps="),
        (lambda: DDIM(eta=1.5), "eta=.*: a number from 0 to 1"),
        (lambda: DDIM(eta=float("nan")), "eta=.*: a number from 0 to 1"),
        (lambda: DDIM(eta=0.5, reverse=True), "the way back to the noise needs eta=0"),
        (
            lambda: DDPM(1001)(None, SMALL, jnp.ones((1, 1, 1, 4))),
            "1001 steps of a diffusion of 1000",
        ),
        (
            lambda: DDIM(5)(None, Interpolant(), jnp.ones((1, 1, 1, 4))),
            "DDIM samples a GaussianDiffusion; Interpolant has no chain of steps",
        ),
        (lambda: DDPM(5)(None, SMALL, jnp.ones((1, 1, 1, 4))), "DDPM needs step_noise"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_prediction_of_data_samples_alike():
    """The same knowledge told as data instead of noise makes the same samples."""
    noise, kicks = normal(3, 3, 2, 2, 4), normal(4, 10, 3, 2, 2, 4)
    by_data = GaussianDiffusion(prediction=predictions.data, variance=fixed_small)
    told_noise = lambda x, t: gaussian(0.0, 1.0, SMALL)(x, t)

    def told_data(x, t):
        alpha, sigma = SMALL.path(t[:, None, None, None])
        return (x - sigma * told_noise(x, t)) / alpha

    ours = sample(DDPM(10), SMALL, told_noise, noise, kicks)
    theirs = sample(DDPM(10), by_data, told_data, noise, kicks)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
