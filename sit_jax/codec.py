"""Between images and what the network sees: image -> moments -> data -> image.

`encode` is worth caching, `draw` is new at every step. A codec is a pytree, so that
its weights are arguments of jitted functions and not constants inside them.
"""

import jax
import jax.numpy as jnp
from flax import struct

from sit_jax.errors import UserError
from sit_jax.pictures import to_uint8


def data_of(codec, key, batch):
    """-> data [B, H, W, C] float32, from whatever the batch holds."""
    if "latent" in batch:
        return batch["latent"]
    moments = batch["moments"] if "moments" in batch else codec.encode(batch["image"])
    return codec.draw(key, moments)


class Pixels(struct.PyTreeNode):
    """The network sees the pixels themselves, from -1 to 1."""

    def encode(self, images):
        """uint8 [B, H, W, C] -> float32 [B, H, W, C] in [-1, 1]."""
        return images.astype(jnp.float32) / 127.5 - 1

    def draw(self, key, moments):
        """There is nothing to draw: the moments are the data."""
        return moments

    def decode(self, data):
        """float [B, H, W, C] -> uint8 [B, H, W, C]."""
        return to_uint8(data)


class Latents(struct.PyTreeNode):
    """Latents that were made elsewhere; there is no VAE to go to pictures and back."""

    scale: float = struct.field(pytree_node=False, default=0.18215)

    def encode(self, images):
        raise UserError(
            "images need a VAE to become latents; give latents or moments as data"
        )

    def draw(self, key, moments):
        """float32 [B, H, W, 2C]: mean, log variance -> [B, H, W, C] of variance ~ 1.

        Stable Diffusion's posterior, with the bounds of its log variance.
        """
        mean, log_var = jnp.split(moments, 2, axis=-1)
        std = jnp.exp(jnp.clip(log_var, -30, 20) / 2)
        return self.scale * (mean + std * jax.random.normal(key, mean.shape))

    def decode(self, data):
        raise UserError("latents need a VAE to become pictures; --out x.npy keeps them")
