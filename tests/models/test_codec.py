"""Codecs: pixels as they are, latents without a VAE and with one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import equations
from helpers.recorded import arrays, relative
from test_vae import SMALL, random_params

from sit_jax.config import from_json, spec, to_json
from sit_jax.errors import UserError
from sit_jax.models.codec import (
    ROUNDINGS,
    Latents,
    Pixels,
    Vae,
    codec_sample,
    to_uint8,
    to_uint8_mdt,
)
from sit_jax.parallel.mesh import batch_sharding, make_mesh
from sit_jax.precision.policy import EXACT

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


def test_drawn_latents_are_the_scaled_posterior():
    m = moments(2, 3, 5)
    eps = jax.random.normal(KEY, (2, 3, 5, 4))
    wanted = 0.18215 * (m[..., :4] + np.exp(m[..., 4:] / 2) * eps)
    np.testing.assert_allclose(Latents().sample(KEY, m), wanted, rtol=1e-5, atol=1e-6)
    other = Latents().sample(jax.random.key(4), m)
    assert np.abs(other - wanted).min() > 0  # another key, other noise everywhere
    half = Latents(scale=0.18215 / 2).sample(KEY, m)
    np.testing.assert_allclose(2 * half, wanted, rtol=1e-5, atol=1e-6)


def test_log_variance_is_bounded_as_in_stable_diffusion():
    at = lambda log_var: Latents(scale=1.0).sample(
        KEY, jnp.stack([jnp.zeros(64), jnp.full(64, log_var)], -1)
    )
    np.testing.assert_array_equal(at(-1e9), at(-30.0))
    np.testing.assert_array_equal(at(1e9), at(20.0))
    assert np.isfinite(at(1e9)).all() and np.abs(at(1e9)).max() > np.exp(9)
    assert not np.array_equal(at(-29.0), at(-30.0))
    assert not np.array_equal(at(19.0), at(20.0))


def test_data_comes_from_whatever_the_batch_holds():
    latent, m = np.ones((2, 3, 3, 4), np.float32), moments(2, 3, 3)
    image = np.arange(18, dtype=np.uint8).reshape(2, 3, 3, 1)
    assert codec_sample(Latents(), KEY, {"latent": latent, "label": 0}) is latent
    drawn = codec_sample(Latents(), KEY, {"moments": m})
    np.testing.assert_array_equal(drawn, Latents().sample(KEY, m))
    pixels = codec_sample(Pixels(), KEY, {"image": image})
    np.testing.assert_array_equal(pixels, Pixels().encode(image))
    vae, images = straight(scale=0.5), np.full((2, 2, 2, 3), 200, np.uint8)
    data = codec_sample(vae, KEY, {"image": images})
    np.testing.assert_array_equal(data, vae.sample(KEY, vae.encode(images)))


def test_latents_say_that_pictures_need_a_vae():
    with pytest.raises(UserError, match=r"VAE to become pictures; --out x\.npy"):
        Latents().decode(np.zeros((1, 2, 2, 4), np.float32))
    with pytest.raises(UserError, match="VAE to become latents"):
        codec_sample(Latents(), KEY, {"image": np.zeros((1, 8, 8, 3), np.uint8)})


@dataclasses.dataclass(frozen=True)
class Straight:
    """Stands for a model: the latent's first three channels are the image."""

    def apply(self, variables, x, method):
        x = x * variables["params"]["gain"]
        return x[..., :3] if method == "decode" else jnp.concatenate([x, -x], -1)


def straight(**fields):
    params = {"gain": jnp.float32(2), "encoder": jnp.ones(3), "decoder": jnp.zeros(3)}
    return Vae(params=params, model=Straight(), **fields)


def test_a_vae_encodes_what_pixels_are_and_decodes_what_was_scaled():
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3) * 10
    pixels = np.asarray(Pixels().encode(images))
    found = straight().encode(images)
    wanted = 2 * np.concatenate([pixels, -pixels], -1)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)  # one fused, one not
    latents = np.random.default_rng(0).normal(size=(5, 2, 2, 4)).astype(np.float32) / 9
    decoded = straight(scale=0.25).decode(latents)
    assert decoded.dtype == jnp.uint8
    np.testing.assert_array_equal(decoded, to_uint8(2 * (latents / 0.25)[..., :3]))


def test_latents_are_unscaled_in_float32():
    half = jnp.asarray(np.linspace(-0.09, 0.09, 48), jnp.bfloat16).reshape(4, 2, 2, 3)
    found = straight().decode(half)
    np.testing.assert_array_equal(found, straight().decode(half.astype(jnp.float32)))
    assert len(np.unique(found)) == 48  # in bfloat16 steps of 1 / 64 become equal


@pytest.mark.parametrize("group", [None, 3, 16])
def test_groups_change_nothing(group):
    latents = np.random.default_rng(1).normal(size=(11, 2, 2, 4)).astype(np.float32)
    wanted = to_uint8(2 * (latents / np.float32(0.18215))[..., :3])
    found = straight(group=group).decode(latents)
    np.testing.assert_array_equal(found, wanted)


def test_groups_stay_on_their_devices():
    mesh = make_mesh(data=-1, fsdp=1)
    latents = np.random.default_rng(1).normal(size=(32, 2, 2, 4)).astype(np.float32)
    split = jax.device_put(latents, batch_sharding(mesh))
    vae = straight(group=8)
    found = jax.jit(lambda vae, x: vae.decode(x))(vae, split)
    np.testing.assert_array_equal(found, vae.decode(latents))
    assert found.sharding.is_equivalent_to(batch_sharding(mesh), found.ndim)


@pytest.mark.parametrize("images", [2, 3, 5])
def test_an_image_does_not_depend_on_those_beside_it(images):
    """Nor could it: a program for so many rows is all that runs."""
    vae = Vae(params=random_params(SMALL), model=SMALL, group=3)
    z = jnp.zeros((images, 4, 4, 4))
    program = jax.make_jaxpr(lambda vae, z: vae.decode(z))(vae, z)
    rows = {
        eqn.invars[0].aval.shape[0]
        for eqn in equations(program.jaxpr)
        if eqn.primitive.name == "conv_general_dilated"
    }
    assert rows == {3}
    assert program.out_avals[0].shape == (images, 8, 8, 3)


def products(vae, method, x):
    """Precisions of all dots and convolutions of a method."""
    run = lambda vae, x: getattr(vae, method)(x)
    program = jax.make_jaxpr(run)(vae, x)
    assert not [c for c in program.consts if np.size(c) > 64]  # no captured weights
    kinds = ("dot_general", "conv_general_dilated")
    found = [e for e in equations(program.jaxpr) if e.primitive.name in kinds]
    assert {e.primitive.name for e in found} == set(kinds)
    return {e.params["precision"] for e in found}


def test_products_are_exact_on_every_platform():
    """All of them ask for HIGHEST; see precision.py for the other words."""
    vae = Vae(params=random_params(SMALL), model=SMALL)
    assert vae.precision is EXACT
    highest = {(jax.lax.Precision.HIGHEST,) * 2}
    assert products(vae, "decode", jnp.zeros((1, 4, 4, 4))) == highest
    assert products(vae, "encode", np.zeros((1, 8, 8, 3), np.uint8)) == highest


def test_recorded_roundings():
    g = arrays("vae")
    x = g["post.in"]
    np.testing.assert_array_equal(to_uint8(x), g["post.sit_dit_uint8"])
    np.testing.assert_array_equal(to_uint8_mdt(x), g["post.mdt_uint8"])
    assert (g["post.sit_dit_uint8"] != g["post.mdt_uint8"]).mean() > 0.3
    assert ROUNDINGS == {"dit": to_uint8, "mdt": to_uint8_mdt}


def test_recorded_draw():
    g = arrays("vae")
    some = lambda name: np.moveaxis(g[name], 1, -1).reshape(32, -1)[:18]
    pixels = lambda name: some(name).reshape(2, 3, 3, -1)
    noise = jax.random.normal(KEY, (2, 3, 3, 4))
    theirs = pixels("sample") + pixels("std") * (noise - pixels("sample_noise"))
    found = straight(scale=1.0).sample(KEY, pixels("moments"))
    assert relative(found, theirs) < 1e-6


@pytest.mark.parametrize("codec", [Pixels, Latents])
def test_the_rule_of_rounding_is_part_of_a_config(codec):
    config = spec(codec, rounding=to_uint8_mdt)
    assert to_json(config)["rounding"] == {"name": "sit_jax.models.codec.to_uint8_mdt"}
    assert from_json(to_json(config), "codec").rounding is to_uint8_mdt
    for rule, level in ((to_uint8, 128), (to_uint8_mdt, 127)):
        assert int(Pixels(rounding=rule).decode(jnp.zeros((1, 1)))[0, 0]) == level
