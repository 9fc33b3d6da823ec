"""Between images and what the network sees: image -> moments -> data -> image.

`encode` is worth caching, `draw` is new at every step. A codec is a pytree, so that
its weights are arguments of jitted functions and not constants inside them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from sit_jax.errors import UserError
from sit_jax.manifest import weights_hash
from sit_jax.models.rounding import to_uint8
from sit_jax.precision.policy import EXACT, Precision, with_precision

fixed = partial(struct.field, pytree_node=False)


def whole(model, params, latents):
    """latents [B, h, w, C], unscaled -> images [B, H, W, 3]: as large as they are."""
    return model.apply({"params": params}, latents, method="decode")


def data_of(codec, key, batch):
    """-> data [B, H, W, C] float32, from whatever the batch holds."""
    if "latent" in batch:
        return batch["latent"]
    moments = batch["moments"] if "moments" in batch else codec.encode(batch["image"])
    return codec.draw(key, moments)


class Pixels(struct.PyTreeNode):
    """The network sees the pixels themselves, from -1 to 1."""

    rounding: Callable = fixed(default=to_uint8)

    def encode(self, images):
        """uint8 [B, H, W, C] -> float32 [B, H, W, C] in [-1, 1]."""
        return images.astype(jnp.float32) / 127.5 - 1

    def draw(self, key, moments):
        """There is nothing to draw: the moments are the data."""
        return moments

    def decode(self, data):
        """float [B, H, W, C] -> uint8 [B, H, W, C]."""
        return self.rounding(data)


class Latents(struct.PyTreeNode):
    """Latents that were made elsewhere; there is no VAE to go to pictures and back."""

    scale: float = fixed(default=0.18215)
    rounding: Callable = fixed(default=to_uint8)  # for the VAE that takes its place

    def encode(self, images):
        raise UserError(
            "images need a VAE to become latents; give latents or moments as data"
        )

    def draw(self, key, moments):
        """float32 [B, H, W, 2C]: mean, log variance -> [B, H, W, C] of variance ~ 1."""
        return self.scale * drawn(key, moments)

    def decode(self, data):
        raise UserError("latents need a VAE to become pictures; --out x.npy keeps them")


class Vae(struct.PyTreeNode):
    """Latents of an autoencoder whose weights are at hand; see vae_files.load_vae.

    model: a models.vae.AutoencoderKL. decoding: (model, params, latents) -> images, the
    whole at once or models.tiles.Tiles. group: images that are decoded together; by
    default 1 on a CPU, which gains nothing from more, and 8 elsewhere.
    """

    params: Any  # {"encoder": .., "decoder": ..}
    model: Any = fixed()
    scale: float = fixed(default=0.18215)
    rounding: Callable = fixed(default=to_uint8)
    precision: Precision = fixed(default=EXACT)
    decoding: Callable = fixed(default=whole)
    group: int | None = fixed(default=None)

    def encode(self, images):
        """uint8 [B, H, W, 3] -> moments float32 [B, H/8, W/8, 2C]."""
        return _encode(self, images)

    def draw(self, key, moments):
        """float32 [B, H, W, 2C]: mean, log variance -> [B, H, W, C] of variance ~ 1."""
        return self.scale * drawn(key, moments)

    def decode(self, data):
        """float [B, h, w, C] of variance ~ 1 -> uint8 [B, 8h, 8w, 3]."""
        return _decode(self, data)

    @property
    def encoder_sha256(self):
        """Two editions can share their encoder, and with it cached latents."""
        return weights_hash(self.params["encoder"])

    @property
    def decoder_sha256(self):
        return weights_hash(self.params["decoder"])

    def record(self):
        """What a manifest says of it."""
        return {
            "encoder_sha256": self.encoder_sha256,
            "decoder_sha256": self.decoder_sha256,
            "scale": self.scale,
            "rounding": self.rounding.__name__,
            "precision": self.precision.word,
            "decoding": getattr(self.decoding, "__name__", str(self.decoding)),
        }


def drawn(key, moments):
    """A sample of Stable Diffusion's posterior, with its bounds of the log variance."""
    mean, log_var = jnp.split(moments, 2, axis=-1)
    std = jnp.exp(jnp.clip(log_var, -30, 20) / 2)
    return mean + std * jax.random.normal(key, mean.shape)


@jax.jit
def _encode(codec, images):
    run = with_precision(codec.precision, partial(codec.model.apply, method="encode"))
    return run({"params": codec.params}, Pixels().encode(images))


@jax.jit
def _decode(codec, data):
    latents = data.astype(jnp.float32) / codec.scale
    decode = with_precision(codec.precision, partial(codec.decoding, codec.model))
    one = lambda part: codec.rounding(decode(codec.params, part))
    size = codec.group or (1 if jax.default_backend() == "cpu" else 8)
    return _in_groups(one, latents, size)


def _in_groups(fn, x, size):
    """fn over x [B, ..], always `size` rows at a time.

    The code of a convolution, and so its last bits, depends on the number of rows; with
    one shape an image does not depend on how many are beside it. A group takes its rows
    from all over the batch: each stays on its device where the batch is split.
    """
    rows, fill = len(x), -len(x) % size
    x = jnp.concatenate([x, x[:1].repeat(fill, 0)]).reshape(size, -1, *x.shape[1:])
    out = jax.lax.map(fn, x.swapaxes(0, 1)).swapaxes(0, 1)
    return out.reshape(-1, *out.shape[2:])[:rows]
