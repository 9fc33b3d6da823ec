"""DDPM's and DDIM's chains against recorded runs, and where the answer is known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import arrays, case, nchw, nhwc, weights

from sit_jax import config, port, predictions
from sit_jax.diffusion import Diffusion, fixed_large, fixed_small
from sit_jax.errors import UserError
from sit_jax.guidance import guided
from sit_jax.interpolant import Interpolant
from sit_jax.models import dit, layers
from sit_jax.noise import given
from sit_jax.samplers.chain import Ancestral, Ddim
from sit_jax.schedules import DdimSpacing

EVERY = case("dit_sampling")["runs"]
RUNS = {r["id"]: r for r in EVERY if "sample" in r["loop"]}
BACK = {r["id"]: r for r in EVERY if r["loop"] == "ddim_reverse"}
SMALL = Diffusion(variance=fixed_small)


@pytest.fixture
def model(monkeypatch):
    """net(x, t, y) with the recorded weights and frequency table."""
    table = arrays("dit_forward_a")["freqs_f32"]
    monkeypatch.setattr(layers, "frequencies", lambda half, shift: table)
    params, _ = port.to_flax(dit.RULES, weights("dit_a"))
    made = dit.DiT(depth=2, width=40, heads=4, classes=10)
    return partial(made.apply, {"params": params})


def sampler_of(run):
    steps = DdimSpacing(25) if run["respacing"] == "ddim25" else int(run["respacing"])
    if run["loop"] == "p_sample_loop":
        return Ancestral(steps, clip=run["clip_denoised"])
    return Ddim(steps, eta=run["eta"], clip=run["clip_denoised"])


def watched(net, states):
    """net, leaving each x it is shown in `states`: the chain step by step."""

    def watching(x, t):
        jax.debug.callback(lambda x: states.append(np.asarray(x)), x, ordered=True)
        return net(x, t)

    return watching


@pytest.mark.parametrize("name", RUNS)
def test_recorded_runs(name, model):
    g, run = arrays("dit_sampling"), RUNS[name]
    labels, sampler = jnp.asarray(g["y"]), sampler_of(run)
    # torch runs both halves of the guidance as one batch, each with noise of its own;
    # the labelled half is the result, the other half's state never reaches it
    draw = given(nhwc(g[run["noise"]])[:, :2])
    states = []
    net = watched(guided(model, labels, 10, run["cfg"] or 1), states)
    chain = jax.jit(lambda z: sampler(draw, Diffusion(), net, z))
    data, stats = chain(nhwc(g["z"]))
    jax.effects_barrier()
    assert stats["evaluations"] == len(states) == run["num_timesteps"]
    # five times the recording's own float32 noise at its end, of the scale there
    # (the unclipped random network leads to values of a thousand); at least 1e-5
    noise, scale = run["f32_vs_f64"]
    slack = max(1e-5, 5 * noise / scale)
    found = {"step0": states[1], "step_mid": states[6], "final": data}
    if noise / scale > 1e-3:
        del found["final"]  # clipping under strong guidance amplifies rounding
    for key in found if "step_mid_index" in run else ["final"]:
        theirs = g[f"{name}.{key}"][:2]
        tolerance = slack * np.abs(theirs).max()
        np.testing.assert_allclose(
            nchw(found[key]), theirs, atol=tolerance, err_msg=key
        )


@pytest.mark.parametrize("name", BACK)
def test_recorded_ways_back(name, model):
    """From data to noise; the original has the step, and no loop of it."""
    g, run = arrays("dit_sampling"), BACK[name]
    net = guided(model, jnp.asarray(g["y"]), 10, run["cfg"] or 1)
    sampler = Ddim(DdimSpacing(25), clip=run["clip_denoised"], reverse=True)
    chain = jax.jit(lambda x: sampler(None, Diffusion(), net, x)[0])
    end = nchw(chain(nhwc(g["x_data"])))
    rounding, scale = run["f32_vs_f64"]
    theirs = g[f"{name}.final"][:2]
    slack = max(1e-5, 5 * rounding / scale) * np.abs(theirs).max()
    np.testing.assert_allclose(end, theirs, atol=slack)


def test_there_and_back_again():
    """A perfect network of Gaussian data leads data to noise and the noise to them."""
    data = 0.5 * jax.random.normal(jax.random.key(0), (2, 2, 2, 1))

    def net(x, t):
        alpha, sigma = SMALL.path(t[:, None, None, None])
        return sigma * x / (0.25 * alpha**2 + sigma**2)

    noise = Ddim(500, reverse=True)(None, SMALL, net, data)[0]
    assert abs(float(jnp.std(noise)) / float(jnp.std(data)) - 2) < 0.05
    again = Ddim(500)(None, SMALL, net, noise)[0]
    # a step errs by its size; the last one ends at data
    np.testing.assert_allclose(again, data, atol=0.05)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_classifier_leads(name):
    """The mean moves by the variance times the gradient, ddim's noise by sigma."""
    process = SMALL.respaced(2)
    x = jax.random.normal(jax.random.key(1), (2, 2, 2, 1))
    told = []

    def lead(x, t):
        told.append(t.tolist())
        return 50 * jnp.ones_like(x)

    net = lambda x, t: 0.3 * x
    still = lambda i: jnp.zeros_like(x)
    make = {"ddpm": Ancestral, "ddim": Ddim}[name]
    with jax.disable_jit():
        moved, _ = make(2, lead=lead)(still, SMALL, net, x)
        told_steps = told[0][0], told[1][0]
        plain, _ = make(2)(still, SMALL, net, x)
    assert told_steps == (999, 0)
    at = lambda t: jnp.full(2, t)
    y = x
    for t in (1, 0):
        mean, log_var, guess = process.posterior(net, y, at(t))
        (alpha_, alpha), (sigma_, sigma) = process.levels(np.array([t - 1, t]))
        if name == "ddpm":
            y = mean + 50 * jnp.exp(log_var)
        else:
            eps = (y - alpha * guess) / sigma - 50 * sigma
            y = alpha_ * (y - sigma * eps) / alpha + sigma_ * eps
    np.testing.assert_allclose(moved, y, rtol=1e-5, atol=1e-4)
    assert np.abs(moved - plain).max() > 1e-3


@pytest.mark.parametrize("make", [Ancestral, Ddim])
def test_guesses_are_mended_before_they_are_clipped(make):
    net = lambda x, t: 0.3 * x
    start, still = 3 * jnp.ones((1, 2, 2, 1)), lambda i: 0.0
    data, _ = make(2, mend=lambda d: 0 * d + 0.25)(still, SMALL, net, start)
    np.testing.assert_allclose(data, 0.25, rtol=1e-5)
    data, _ = make(2, clip=True, mend=lambda d: 9 + 0 * d)(still, SMALL, net, start)
    np.testing.assert_allclose(data, 1.0, rtol=1e-5)


def test_states_kept_on_the_way():
    net = lambda x, t: 0.3 * x
    start = jnp.ones((2, 2, 2, 1))
    data, stats = Ddim(9, frames=3)(None, SMALL, net, start)
    assert stats["trajectory"].shape == (3, 2, 2, 2, 1)
    np.testing.assert_array_equal(stats["trajectory"][-1], data)


def formula(name, steps, eta=0.0, clip=False):
    """The first numbers of a chain of closed-form network, start and noise."""
    shape = (2, 4, 2, 2)
    wave = lambda x: nhwc(np.cos(x).astype(np.float32).reshape(shape))
    count = np.arange(32.0)

    def net(x, t):
        guess = 0.5 * x + 1e-4 * t[:, None, None, None]
        return jnp.concatenate([guess, 0.3 * jnp.sin(x)], axis=-1)

    sampler = name(steps, clip=clip) if name is Ancestral else name(steps, eta, clip)
    kicks = np.stack([wave(1.7 * count + k) for k in range(steps)])
    z = wave(0.9 * count)
    return nchw(sample(sampler, Diffusion(), net, z, kicks)).ravel()[:3]


@pytest.mark.parametrize(
    "arguments, recorded",
    [
        ((Ancestral, 250), [0.2461303, -0.1848996, -0.5418665]),
        ((Ancestral, 250, 0, True), [-0.0825307, -0.1264677, -0.1607517]),
        ((Ddim, 250, 0.0), [7.6520476, 4.2394667, -3.4156756]),
        ((Ddim, 250, 0.5, True), [0.6620407, 0.3660417, -0.4498788]),
        ((Ddim, 250, 1.0), [0.2500244, -0.1797140, -0.5445823]),
        ((Ddim, 10, 1.0), [4.5661392, -0.5709831, -3.7925200]),
    ],
)
def test_released_chains_of_a_formula(arguments, recorded):
    """Long chains and eta = 1, which the runs of the network lack."""
    # 1e-5: rounding over 250 steps, and seven digits in the list above
    slack = 1e-5 * np.abs(recorded).max()
    np.testing.assert_allclose(formula(*arguments), recorded, atol=slack)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@partial(jax.jit, static_argnums=(0, 1, 2))
def sample(sampler, process, net, noise, kicks):
    return sampler(given(kicks), process, net, noise)[0]


def truthful(data, process=SMALL):
    """A network that knows the data, asked for the noise; t are original steps."""

    def net(x, t):
        alpha, sigma = process.path(t[:, None, None, None])
        return (x - alpha * data) / sigma

    return net


@pytest.mark.parametrize(
    "sampler", [Ancestral(20), Ancestral(1000), Ddim(20), Ddim(20, eta=1.0), Ddim(1)]
)
def test_truth_leads_to_the_data(sampler):
    data, noise = normal(0, 2, 3, 2, 2, 4)
    found = sample(sampler, SMALL, truthful(data), noise, normal(1, 1000, 3, 2, 2, 4))
    np.testing.assert_allclose(found, data, atol=1e-5)


def test_ddim_keeps_the_noise_it_started_with():
    """eta = 0 and the truth: every state mixes the same data and the same noise."""
    data, noise = normal(0, 2, 3, 2, 2, 4)
    process = SMALL.respaced(10)
    alpha, sigma = process.levels(np.arange(10))
    states = []
    net = watched(truthful(data), states)
    start = alpha[-1] * data + sigma[-1] * noise
    jax.jit(lambda x: Ddim(10)(None, SMALL, net, x))(start)
    jax.effects_barrier()
    for x, a, s in zip(states, alpha[::-1], sigma[::-1], strict=True):
        np.testing.assert_allclose(x, a * data + s * noise, atol=2e-5)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_weights_keep_the_levels(eta):
    """Data and noise in the next state are as the next index wants them."""
    for process in (SMALL, SMALL.respaced(10)):
        t = np.arange(len(process.betas))
        (alpha_, sigma_), (alpha, sigma) = process.levels(t - 1), process.levels(t)
        on_data, on_x, std = Ddim(eta=eta).weights(process)
        np.testing.assert_allclose(on_data + on_x * alpha, alpha_, rtol=1e-12)
        held = (on_x * sigma) ** 2 + std**2
        np.testing.assert_allclose(held, sigma_**2, rtol=1e-12)
        assert std[0] == 0 and np.any(std) == (eta > 0)


def test_ddim_with_eta_one_is_ddpm():
    """Same variance and same mean as the chain with the true step's variance."""
    process = SMALL.respaced(10)
    on_data, on_x, std = Ddim(eta=1.0).weights(process)
    np.testing.assert_allclose(std**2, process.true_step[2], rtol=1e-12)
    np.testing.assert_allclose(on_data, process.true_step[0], rtol=1e-12)
    np.testing.assert_allclose(on_x, process.true_step[1], rtol=1e-12, atol=1e-12)


def gaussian(mean, std, process):
    """The best guess at the noise when the data are N(mean, std^2)."""

    def net(x, t):
        alpha, sigma = process.path(t[:, None, None, None])
        return sigma * (x - alpha * mean) / ((alpha * std) ** 2 + sigma**2)

    return net


@pytest.mark.parametrize("sampler", [Ancestral(250), Ddim(250), Ddim(250, eta=1.0)])
def test_samples_of_a_gaussian(sampler):
    process = Diffusion(variance=fixed_large)
    net = gaussian(0.7, 0.4, process)
    kicks, noise = normal(2, 250, 2000, 1, 1, 4), normal(3, 2000, 1, 1, 4)
    data = sample(sampler, process, net, noise, kicks)
    # 8000 numbers: standard errors 0.005 and 0.003, and 250 steps are 3 % off in width
    np.testing.assert_allclose(jnp.mean(data), 0.7, atol=0.015)
    np.testing.assert_allclose(jnp.std(data), 0.4, atol=0.02)


def test_noise_is_drawn_in_the_order_of_the_steps():
    """draw(0) leaves the noisiest index, draw(1) the next; the last one is masked."""
    process, silent = SMALL.respaced(3), lambda x, t: jnp.zeros_like(x)
    zero = jnp.zeros((1, 1, 1, 1))
    ends = [
        Ancestral(3)(lambda i, k=k: zero + (i == k), SMALL, silent, zero)[0]
        for k in range(3)
    ]
    # each step is linear in x; with no noise seen, the data guess is x / alpha
    (alpha, _), (on_data, on_x, var) = process.levels(np.arange(3)), process.true_step
    pull = on_data / alpha + on_x
    exact = [np.sqrt(var[2]) * pull[1] * pull[0], np.sqrt(var[1]) * pull[0], 0.0]
    np.testing.assert_allclose(np.ravel(ends), exact, rtol=1e-5)


def test_ddim_without_eta_draws_nothing():
    def draw(i):
        raise AssertionError("drawn")

    noise = jnp.ones((2, 2, 2, 4))
    data, stats = Ddim(5)(draw, SMALL, truthful(noise), noise)
    assert data.shape == noise.shape
    assert stats["evaluations"] == 5 and stats["evaluations"].dtype == jnp.int32


def test_network_sees_original_steps():
    told = []

    def net(x, t):
        jax.debug.callback(lambda t: told.append(t.tolist()), t, ordered=True)
        return jnp.zeros_like(x)

    Ddim((2, 1))(None, SMALL, net, jnp.ones((2, 1, 1, 4)))
    jax.effects_barrier()
    assert told == [[500, 500], [499, 499], [0, 0]]


@pytest.mark.parametrize("sampler", [Ancestral, Ddim])
@pytest.mark.parametrize("steps", [0, -3, 2.5, "50", (0, 0)])
def test_impossible_steps(sampler, steps):
    with pytest.raises(UserError, match="steps="):
        sampler(steps)


@pytest.mark.parametrize("sampler", [Ancestral(1001), Ddim(1001)])
def test_more_steps_than_the_schedule(sampler):
    with pytest.raises(UserError, match="1001 steps of a diffusion of 1000"):
        sampler(None, SMALL, None, jnp.ones((1, 1, 1, 4)))


@pytest.mark.parametrize("eta", [-0.1, 1.5, float("nan")])
def test_impossible_eta(eta):
    with pytest.raises(UserError, match="eta=.*: from 0, no fresh noise"):
        Ddim(eta=eta)


@pytest.mark.parametrize("sampler", [Ancestral(5), Ddim(5)])
def test_a_process_without_a_chain(sampler):
    words = f"{type(sampler).__name__} samples a Diffusion; Interpolant has no chain"
    with pytest.raises(UserError, match=f"{words} of steps: use Ode or Sde"):
        sampler(None, Interpolant(), None, jnp.ones((1, 1, 1, 4)))


def test_prediction_of_data_samples_alike():
    """The same knowledge told as data instead of noise makes the same samples."""
    noise, kicks = normal(3, 3, 2, 2, 4), normal(4, 10, 3, 2, 2, 4)
    by_data = Diffusion(predicts=predictions.data, variance=fixed_small)
    told_noise = lambda x, t: gaussian(0.0, 1.0, SMALL)(x, t)

    def told_data(x, t):
        alpha, sigma = SMALL.path(t[:, None, None, None])
        return (x - sigma * told_noise(x, t)) / alpha

    ours = sample(Ancestral(10), SMALL, told_noise, noise, kicks)
    theirs = sample(Ancestral(10), by_data, told_data, noise, kicks)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_as_a_config():
    for sampler in (Ancestral(10, clip=True), Ddim((5, 5), eta=0.5)):
        fields = {k: getattr(sampler, k) for k in sampler.__dataclass_fields__}
        node = config.spec(type(sampler), **fields)
        assert config.build(config.from_json(config.to_json(node))) == sampler
    node = config.spec(Ddim, steps=config.spec(DdimSpacing, steps=25))
    assert config.build(config.from_json(config.to_json(node))) == Ddim(DdimSpacing(25))
