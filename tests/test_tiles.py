"""Decoding by tiles against decoding the whole."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from networks import quick_jit
from recorded import relative
from test_vae import random_params

from sit_jax.errors import UserError
from sit_jax.models.codec import whole
from sit_jax.models.tiles import Tiles, Windows, margin
from sit_jax.models.vae import AutoencoderKL
from sit_jax.models.vae_layers import Norm

# Three resolutions, of which tiles have two; in groups of two channels norms differ
# from place to place more than in those of 4 to 16 of the full size.
MODEL = AutoencoderKL(channels=(4, 4, 8), layers=1, groups=2)


@functools.cache
def latents():
    """float32 [1, 24, 20, 4], of another contrast and mean at every place."""
    rng = np.random.default_rng(0)
    contrast, mean = np.linspace(0.2, 2, 24), np.linspace(-1, 1, 20)
    z = rng.normal(size=(1, 24, 20, 4)) * contrast[None, :, None, None]
    return (z + mean[None, None, :, None]).astype(np.float32)


@functools.cache
def decoded(decoding):
    run = lambda params, z: decoding(MODEL, params, z)
    return np.asarray(quick_jit(run)(random_params(MODEL), latents()))


def test_tiles_whose_norms_cover_the_image_are_the_whole():
    # 5 patches of 5 cover the 24 rows, and the 20 columns in part twice
    found = decoded(Tiles(size=20, overlap=10, patches=5))
    assert found.shape == (1, 96, 80, 3)
    assert relative(found, decoded(whole)) < 3e-6  # float32 through ten norms


def test_windows_cover_every_pixel_once_and_leave_margins_out():
    for side, size, overlap in ((24, 16, 8), (25, 10, 4), (9, 16, 8), (40, 16, 5)):
        windows = Windows(side, size, overlap, 2)
        weights, total = windows.weights(3), np.zeros(3 * side)
        for start, row in zip(windows.starts, weights, strict=True):
            total[3 * start : 3 * start + len(row)] += row
            assert start == 0 or not row[:6].any()
            assert start == side - windows.length or not row[-6:].any()
        np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_margin_is_as_far_as_the_decoder_sees():
    assert margin(AutoencoderKL()) == 3  # 22 pixels of 24
    variables = {"params": random_params(MODEL)}

    def finished(x):
        """With norms that are what they are whatever x is."""
        with nn.intercept_methods(unmoved):
            return MODEL.apply(variables, x, method="finish")

    x = jnp.ones((1, 24, 4, 8))
    run = quick_jit(finished)
    change = np.abs(np.asarray(run(x) - run(x.at[:, 0].add(1.0))))
    rows = np.flatnonzero(change.max((0, 2, 3)))
    # the changed row is 4 pixels of the image; the farthest of what sees it is 16 on
    assert rows.max() == 3 + 16 == 3 + 4 * margin(MODEL)


def unmoved(call, args, kwargs, context):
    if not isinstance(context.module, Norm):
        return call(*args, **kwargs)
    width = args[0].shape[-1]
    return call(*args, (jnp.zeros((1, width)), jnp.ones((1, width))))


@pytest.mark.parametrize(
    "fields",
    [dict(overlap=7), dict(size=12), dict(patches=0)],
    ids=["narrow", "small", "none"],
)
def test_settings_that_would_show_seams_are_refused(fields):
    tiles = Tiles(**{"size": 16, "overlap": 8, **fields})
    with pytest.raises(UserError, match="overlap from 8, twice as far as"):
        tiles(MODEL, random_params(MODEL), latents())
