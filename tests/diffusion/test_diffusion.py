"""The Gaussian diffusion against algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.diffusions import EVERY, FULL, batch, given, loss_of, posterior_of, some
from helpers.recorded import arrays, nhwc

from sit_jax import config
from sit_jax.diffusion import gaussian as d
from sit_jax.diffusion import predictions
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.paths import expand_dims_like
from sit_jax.diffusion.schedules import cosine_betas
from sit_jax.errors import UserError


def test_true_step_is_bayes_rule():
    """Precisions of the two Gaussians that meet at x_{t-1} add up."""
    t = np.arange(1, 1000)
    (alpha_, sigma_), beta = FULL.float64_path(t - 1), FULL.betas[t]
    precision = 1 / sigma_**2 + (1 - beta) / beta
    on_data, on_x, var = (table[t] for table in FULL.q_posterior)
    np.testing.assert_allclose(var, 1 / precision, rtol=1e-10)
    np.testing.assert_allclose(on_data, alpha_ / sigma_**2 / precision, rtol=1e-10)
    np.testing.assert_allclose(on_x, np.sqrt(1 - beta) / beta / precision, rtol=1e-10)


@pytest.mark.parametrize(
    "predicts", [predictions.noise, predictions.data, predictions.score]
)
def test_telling_the_truth(predicts):
    """Whatever is predicted: the right answer costs nothing and gives the data."""
    process = GaussianDiffusion(
        prediction=predicts, variance=d.fixed_small, objective=d.kl_loss
    )
    data, noise = some(0, 1000, 2, 2, 4), some(1, 1000, 2, 2, 4)
    t = expand_dims_like(EVERY, data)
    (alpha, sigma), (p, q) = process.path(t), process.target_weights(t)
    x, out = alpha * data + sigma * noise, p * data + q * noise
    mean, _, found = posterior_of(process, out, x, EVERY)
    # float32 is divided by alpha = 0.006
    np.testing.assert_allclose(found, data, atol=5e-3)
    on_data, on_x, _ = (d.lookup(table, t) for table in process.q_posterior)
    np.testing.assert_allclose(mean, on_data * data + on_x * x, atol=2e-6)
    loss = loss_of(process, out, data, noise, EVERY)["loss"]
    np.testing.assert_allclose(loss[1:], 0, atol=1e-6)
    squared = GaussianDiffusion(prediction=predicts, variance=d.fixed_small)
    assert not np.any(loss_of(squared, out, data, noise, EVERY)["loss"] > 1e-10)


def test_bound_leaves_the_mean_alone():
    """In the hybrid loss only the squared error reaches the guess."""
    data, noise, t = batch()

    def parts(scale, v, process):
        net = lambda x, t: jnp.concatenate([scale * x, v + 0.1 * x], axis=-1)
        return jax.tree.map(jnp.sum, process.losses(net, data, noise, t))

    slopes = jax.jit(jax.jacrev(parts, (0, 1)), static_argnums=2)
    both, alone = (
        slopes(0.5, 0.2, p) for p in (FULL, GaussianDiffusion(objective=d.kl_loss))
    )
    assert both["vb"][0] == 0 and both["loss"][0] == both["mse"][0] != 0
    assert both["mse"][1] == 0 and both["loss"][1] == both["vb"][1] != 0
    assert alone["loss"][0] != 0
    np.testing.assert_allclose(alone["loss"][1], both["vb"][1], rtol=1e-6)


def test_rescaling_counts_the_visited_steps():
    data, noise, out = some(0, 4, 2, 2, 4), some(1, 4, 2, 2, 4), some(2, 4, 2, 2, 8)

    def loss(objective):
        process = GaussianDiffusion(objective=objective).respace(50)
        return loss_of(process, out, data, noise, jnp.array([1, 2, 30, 49]))

    plain, hybrid = loss(d.kl_loss), loss(d.hybrid_loss)
    np.testing.assert_allclose(loss(d.rescaled_kl_loss)["loss"], 50 * plain["loss"])
    vb = loss(d.rescaled_hybrid_loss)["vb"]
    np.testing.assert_allclose(vb, hybrid["vb"] * 50 / 1000, rtol=1e-6)
    np.testing.assert_allclose(plain["vb"], hybrid["vb"], rtol=1e-6)


@pytest.mark.parametrize("objective", [d.hybrid_loss, d.rescaled_kl_loss])
def test_finite_at_every_step(objective):
    """Loss and gradient, at all 1000 steps, data outside [-1, 1] included."""
    process = GaussianDiffusion(objective=objective)
    data, noise = 3 * some(0, 1000, 2, 2, 4), some(1, 1000, 2, 2, 4)

    def loss(out):
        terms = process.losses(given(out), data, noise, EVERY)
        return jnp.sum(terms["loss"]), terms["loss"]

    grads, losses = jax.jit(jax.grad(loss, has_aux=True))(some(2, 1000, 2, 2, 8))
    assert np.isfinite(losses).all() and np.isfinite(grads).all()


def test_bins_share_all_of_the_mass():
    """At step 0 the 256 values of an 8-bit image have probabilities that sum to 1."""
    data = jnp.linspace(-1, 1, 256).reshape(256, 1, 1, 1)
    same = lambda value: jnp.full_like(data, value)
    # a mean near the edge, so that the open outermost bin matters
    step0 = d.NoisyBatch(data, data, same(0.97), jnp.zeros((256, 1, 1, 1), jnp.int32))
    bits, _ = jax.jit(FULL.vb_terms)(step0, same(0.0), same(-6.0))
    np.testing.assert_allclose(jnp.sum(2.0**-bits), 1, atol=1e-5)
    # the middle of the range by hand: bin width times density, std exp(-3)
    distance = float(data[244, 0, 0, 0]) - 0.97 / FULL.float64_path(0)[0]
    density = np.exp(-(distance**2) * np.exp(6) / 2) / np.sqrt(2 * np.pi) * np.exp(3)
    # 3 %: the tanh in place of the normal distribution function
    np.testing.assert_allclose(2.0 ** -bits[244], 2 / 255 * density, rtol=0.03)


def test_variances_lie_where_they_should():
    x, t = some(0, 1000, 1, 1, 4), EVERY
    both = [jnp.concatenate([x, jnp.full_like(x, v)], axis=-1) for v in (-1, 0, 1, 3)]
    ours = [posterior_of(FULL, out, x, t)[1][:, 0, 0, 0] for out in both]
    low, high = FULL.log_variances
    np.testing.assert_allclose(ours[0], low, rtol=1e-6)
    np.testing.assert_allclose(ours[1], (low + high) / 2, rtol=1e-6)
    np.testing.assert_allclose(ours[2], high, rtol=1e-6)
    # not clamped: v beyond 1 leaves the range
    np.testing.assert_allclose(ours[3], high + (high - low), rtol=1e-5)


def test_times_are_uniform_over_all_steps():
    t = np.asarray(FULL.sample_times(jax.random.key(0), 200_000))
    counts = np.bincount(t, minlength=1000)
    assert t.dtype == np.int32 and t.min() == 0 and t.max() == 999
    # 200 expected in each, so a standard deviation of 14
    assert counts.min() > 200 - 6 * 14.2 and counts.max() < 200 + 6 * 14.2
    few = np.asarray(FULL.respace(3).sample_times(jax.random.key(0), 100))
    assert set(few) == {0, 1, 2}


def test_network_is_told_original_steps():
    told = []
    net = lambda x, t: told.append(t) or jnp.zeros((3, 2, 2, 8))
    x = some(0, 3, 2, 2, 4)
    process = FULL.respace(10)
    process.posterior(net, x, jnp.array([0, 4, 9]))
    process.losses(net, x, x, jnp.array([0, 4, 9]))
    for t in told:
        assert t.dtype == jnp.int32
        np.testing.assert_array_equal(t, [0, 444, 999])


def test_respacing_keeps_the_levels():
    once, twice = FULL.respace(100), FULL.respace(100).respace(4)
    assert twice.timestep_map == tuple(once.timestep_map[i] for i in (0, 33, 66, 99))
    for process in (once, twice):
        ours = process.float64_path(np.arange(len(process.betas)))
        theirs = FULL.float64_path(np.array(process.timestep_map))
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


@pytest.mark.parametrize("variance", [d.learned_range, d.fixed_large, d.fixed_small])
def test_a_chain_of_one_step(variance):
    """The released code fails here; beta stands in for the missing variance."""
    process = GaussianDiffusion(variance=variance).respace(1)
    out = some(0, 2, 2, 2, 8 if variance is d.learned_range else 4)
    x, t = some(1, 2, 2, 2, 4), jnp.zeros(2, jnp.int32)
    mean, log_var, data = posterior_of(process, out, x, t)
    np.testing.assert_array_equal(mean, data)
    np.testing.assert_allclose(log_var, np.log(1e-4), rtol=1e-6)
    assert np.isfinite(loss_of(process, out, x, x, t)["loss"]).all()


def test_half_precision_network():
    """Its output is read in float32: the bound is not computed in eight bits."""
    data, noise, t = batch()
    out = jnp.asarray(nhwc(arrays("dit_training_losses")["fixed_model_output"]))
    rough = out.astype(jnp.bfloat16)
    ours = loss_of(FULL, rough, data, noise, t)
    theirs = loss_of(FULL, rough.astype(jnp.float32), data, noise, t)
    for key in ours:
        np.testing.assert_array_equal(ours[key], theirs[key])


@pytest.mark.parametrize(
    "fields, channels, words",
    [
        (
            {},
            4,
            "learned_range needs 8 output channels, the network has 4.*learn_sigma",
        ),
        ({"variance": d.fixed_large}, 8, "fixed_large needs 4 .* has 8.*=False"),
        ({"variance": d.fixed_small}, 8, "fixed_small needs 4 .* has 8.*=False"),
        ({"objective": d.kl_loss}, 4, "needs 8 output channels, the network has 4"),
    ],
)
def test_wrong_number_of_channels(fields, channels, words):
    process, x, t = GaussianDiffusion(**fields), some(0, 2, 2, 2, 4), jnp.array([1, 2])
    out = jnp.ones((2, 2, 2, channels))
    with pytest.raises(UserError, match=words):
        process.losses(given(out), x, x, t)
    with pytest.raises(UserError, match=words):
        posterior_of(process, out, x, t)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"prediction": predictions.velocity}, "cannot predict velocity.*Interpolant"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 10}, "betas from 0.01 to 2, outside 0..1; keep steps=1000"),
        ({"use_timesteps": ()}, "ascending step numbers from 0 to 999"),
        ({"use_timesteps": (0, 5, 5)}, "ascending"),
        ({"use_timesteps": (5, 1000)}, "from 0 to 999"),
        ({"use_timesteps": (-1, 5)}, "from 0 to 999"),
    ],
)
def test_impossible_settings(fields, words):
    with pytest.raises(UserError, match=words):
        GaussianDiffusion(**fields)


def test_as_a_config():
    settings = dict(
        schedule=cosine_betas, prediction=predictions.score, variance=d.fixed_small
    )
    process = GaussianDiffusion(
        objective=d.rescaled_kl_loss, use_timesteps=(0, 10, 999), **settings
    )
    node = config.spec(GaussianDiffusion, objective=d.rescaled_kl_loss, **settings)
    node.use_timesteps = (0, 10, 999)
    assert config.build(config.from_json(config.to_json(node), "process")) == process
    assert config.build(config.spec(GaussianDiffusion)) == FULL != process
