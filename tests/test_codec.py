"""Codecs: pixels as they are, and latents without a VAE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.codec import Latents, Pixels, data_of
from sit_jax.errors import UserError

KEY = jax.random.key(3)


def moments(*shape):
    """float32 [*shape, 8]: means around 2, log variances around -1."""
    rng = np.random.default_rng(0)
    mean, log_var = rng.normal(2, 1, (*shape, 4)), rng.normal(-1, 1, (*shape, 4))
    return np.concatenate([mean, log_var], -1).astype(np.float32)


def test_pixels_span_minus_one_to_one_and_come_back():
    ramp = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x = Pixels().encode(ramp)
    assert x.dtype == jnp.float32
    assert float(x.min()) == -1 and float(x.max()) == 1
    # evenly spaced: 255 steps of 2 / 255, to float32 rounding at 1
    steps = np.diff(np.asarray(x, np.float64).ravel())
    np.testing.assert_allclose(steps, 2 / 255, atol=2e-7)
    np.testing.assert_array_equal(Pixels().decode(x), ramp)


def test_codecs_are_pytrees_that_jit_takes_as_arguments():
    batch = {"moments": moments(2, 3, 3)}
    draw = jax.jit(data_of)
    np.testing.assert_allclose(
        draw(Latents(), KEY, batch), data_of(Latents(), KEY, batch), rtol=1e-6
    )  # one compiled against one interpreted: the last bit of exp
    image = {"image": np.full((2, 3, 3, 1), 200, np.uint8)}
    np.testing.assert_allclose(draw(Pixels(), KEY, image), 200 / 127.5 - 1, rtol=1e-6)


def test_drawn_latents_are_the_scaled_posterior():
    m = moments(2, 3, 5)
    eps = jax.random.normal(KEY, (2, 3, 5, 4))
    wanted = 0.18215 * (m[..., :4] + np.exp(m[..., 4:] / 2) * eps)
    np.testing.assert_allclose(Latents().draw(KEY, m), wanted, rtol=1e-5, atol=1e-6)
    other = Latents().draw(jax.random.key(4), m)
    assert np.abs(other - wanted).min() > 0  # another key, other noise everywhere
    half = Latents(scale=0.18215 / 2).draw(KEY, m)
    np.testing.assert_allclose(2 * half, wanted, rtol=1e-5, atol=1e-6)


def test_log_variance_is_bounded_as_in_stable_diffusion():
    at = lambda log_var: Latents(scale=1.0).draw(
        KEY, jnp.stack([jnp.zeros(64), jnp.full(64, log_var)], -1)
    )
    np.testing.assert_array_equal(at(-1e9), at(-30.0))
    np.testing.assert_array_equal(at(1e9), at(20.0))
    assert np.isfinite(at(1e9)).all() and np.abs(at(1e9)).max() > np.exp(9)
    assert not np.array_equal(at(-29.0), at(-30.0))
    assert not np.array_equal(at(19.0), at(20.0))


def test_data_comes_from_whatever_the_batch_holds():
    latent = np.ones((2, 3, 3, 4), np.float32)
    assert data_of(Latents(), KEY, {"latent": latent, "label": 0}) is latent
    m = moments(2, 3, 3)
    np.testing.assert_array_equal(
        data_of(Latents(), KEY, {"moments": m}), Latents().draw(KEY, m)
    )
    image = np.arange(18, dtype=np.uint8).reshape(2, 3, 3, 1)
    np.testing.assert_array_equal(
        data_of(Pixels(), KEY, {"image": image}), Pixels().encode(image)
    )


def test_latents_say_that_pictures_need_a_vae():
    with pytest.raises(UserError, match=r"VAE to become pictures; --out x\.npy"):
        Latents().decode(np.zeros((1, 2, 2, 4), np.float32))
    with pytest.raises(UserError, match="VAE to become latents"):
        data_of(Latents(), KEY, {"image": np.zeros((1, 8, 8, 3), np.uint8)})
