"""A classifier leads an unconditional chain to the digit asked for (`lead`).

The network is exact: the mean of the training digits, weighed by how likely each has
become the noisy image. The classifier is a small one, trained here on noisy digits.
About a minute.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sit_jax.data.sources import Digits
from sit_jax.diffusion import rng
from sit_jax.diffusion.gaussian import GaussianDiffusion, fixed_small
from sit_jax.evaluation.digits import digit_figures
from sit_jax.samplers.ddpm import DDIM, DDPM

PROCESS = GaussianDiffusion(variance=fixed_small)
SOURCE = Digits()
DATA = jnp.asarray(SOURCE.images, jnp.float32) / 127.5 - 1
EACH = 20


def exact(x, t):
    """E[noise | x]; t int [B] of the full schedule."""
    alpha, sigma = (jnp.asarray(level[t]) for level in LEVELS)
    flat, data = x.reshape(len(x), -1), DATA.reshape(len(DATA), -1)
    off = flat[:, None] - alpha[:, None, None] * data[None]
    weights = jax.nn.softmax(-(off**2).sum(-1) / (2 * sigma**2)[:, None])
    return ((flat - alpha[:, None] * (weights @ data)) / sigma[:, None]).reshape(
        x.shape
    )


LEVELS = [jnp.asarray(x, jnp.float32) for x in PROCESS.float64_path(np.arange(1000))]


def logits(params, x, t):
    """[B, 8, 8, 1], [B] -> [B, 10]: two layers, told the noise's level."""
    alpha = LEVELS[0][t][:, None]
    h = jnp.concatenate([x.reshape(len(x), -1), alpha, alpha**2], -1)
    h = jax.nn.silu(h @ params["in"] + params["shift"][None])
    return h @ params["out"]


@pytest.fixture(scope="module")
def classifier():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(0, shape[0] ** -0.5, shape), "float32")
    params = {"in": draw(66, 256), "shift": jnp.zeros(256), "out": draw(256, 10)}
    tx, labels = optax.adam(2e-3), jnp.asarray(SOURCE.labels)

    def loss(params, key):
        pick, when, kick = jax.random.split(key, 3)
        i = jax.random.randint(pick, (256,), 0, len(DATA))
        t = jax.random.randint(when, (256,), 0, 1000)
        alpha, sigma = (level[t][:, None, None, None] for level in LEVELS)
        x = alpha * DATA[i] + sigma * jax.random.normal(kick, (256, 8, 8, 1))
        found = logits(params, x, t)
        return optax.softmax_cross_entropy_with_integer_labels(found, labels[i]).mean()

    def step(state, key):
        params, held = state
        updates, held = tx.update(jax.grad(loss)(params, key), held)
        return (optax.apply_updates(params, updates), held), None

    keys = jax.random.split(jax.random.key(0), 3_000)
    run = jax.jit(lambda state: jax.lax.scan(step, state, keys)[0])
    return run((params, tx.init(params)))[0]


def recognised(sampler):
    """-> share of EACH samples a digit that a judge recognises as the wanted ones."""
    labels = np.repeat(np.arange(10), EACH)
    keys = rng.image_keys(0, np.arange(len(labels)))
    shape = (8, 8, 1)
    run = lambda keys: sampler(
        exact, PROCESS, rng.initial_noise(keys, shape), rng.step_noise(keys, shape)
    )
    data, _ = jax.jit(run)(keys)
    images = np.clip(np.asarray(data) * 127.5 + 128, 0, 255).astype(np.uint8)
    return digit_figures(images, labels)


@pytest.mark.parametrize("kind", [DDPM, DDIM])
def test_the_digits_are_those_asked_for(classifier, kind):
    wanted = jnp.repeat(jnp.arange(10), EACH)

    def lead(x, t):
        chosen = lambda x: (
            jax.nn.log_softmax(logits(classifier, x, t))[jnp.arange(len(x)), wanted]
        ).sum()
        return 3 * jax.grad(chosen)(x)

    alone, led = (recognised(kind(steps=50, cond_fn=each)) for each in (None, lead))
    print(alone, led)
    assert alone["samples_recognised"] < 0.25  # one in ten, by chance
    assert led["samples_recognised"] > 0.8
