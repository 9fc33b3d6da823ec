"""Which autoencoder belongs to the latents of a run, and how it rounds."""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers import small
from helpers.codecs import GOLDEN, recorded_params

from sit_jax.config import spec
from sit_jax.convert.vae import encoder_warning, load_vae, with_vae
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment
from sit_jax.manifest import weights_hash
from sit_jax.models.codec import Latents, to_uint8_mdt


def test_encoder_and_decoder_are_hashed_apart():
    vae = load_vae(GOLDEN)
    assert vae.encoder_sha256 == weights_hash(recorded_params()["encoder"])
    params = jax.tree.map(lambda leaf: leaf, vae.params)
    params["decoder"]["finish"]["conv_out"]["bias"] += 1
    other = vae.replace(params=params)
    assert other.encoder_sha256 == vae.encoder_sha256
    assert other.decoder_sha256 != vae.decoder_sha256
    assert vae.record() == {
        "encoder_sha256": vae.encoder_sha256,
        "decoder_sha256": vae.decoder_sha256,
        "scale": 0.18215,
        "rounding": "to_uint8",
        "precision": "exact",
    }


@functools.cache
def parts(codec=Latents, channels=4, **fields):
    config = small.config(shape=(4, 4, channels))
    config.codec = spec(codec, **fields)
    return build_experiment(config)


def test_a_vae_takes_the_place_of_latents_and_rounds_as_they_say():
    vae = load_vae(GOLDEN)
    found = with_vae(parts(rounding=to_uint8_mdt), vae)
    assert found.codec == vae.replace(rounding=to_uint8_mdt)
    out = jax.eval_shape(found.codec.decode, jnp.zeros((1, *found.shape)))
    assert out.shape == (1, 32, 32, 3) and out.dtype == jnp.uint8


def test_a_vae_of_other_latents_is_refused():
    vae = load_vae(GOLDEN)
    with pytest.raises(
        UserError, match="4 channels, scaled by 0.18215, the .* 4 and 1.0"
    ):
        with_vae(parts(scale=1.0), vae)
    with pytest.raises(UserError, match="the network's 2 and 0.18215: take another"):
        with_vae(parts(channels=2), vae)
    from sit_jax.models.codec import Pixels

    with pytest.raises(UserError, match="works on Pixels, not on latents; leave out"):
        with_vae(parts(Pixels, 3), vae)


def test_latents_of_another_encoder_are_told():
    """An edition with the same encoder is none, nor is a run that does not say."""
    vae = {"encoder_sha256": "b" * 64}
    said = encoder_warning("v", vae, "runs/x", {"encoder_sha256": "a" * 64})
    assert said.startswith("WARNING: runs/x was trained on latents of another encoder")
    assert f"({'a' * 12}, not {'b' * 12})" in said
    assert encoder_warning("v", vae, "runs/x", vae) is None
    assert encoder_warning("v", vae, "runs/x", {}) is None
    assert encoder_warning(None, {}, "runs/x", vae) is None
