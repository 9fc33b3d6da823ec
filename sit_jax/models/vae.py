"""Stable Diffusion's autoencoder: images to a Gaussian over latents an eighth as wide.

Rombach et al., arXiv:2112.10752, in the sizes and with the arithmetic of diffusers'
AutoencoderKL, whose ft-mse and ft-ema editions SiT, DiT and MDT were trained on.
Channels last; spatial sizes are free. `dtype` is what convolutions and the residual
stream run in; parameters, norms and outputs are float32.
"""

import flax.linen as nn
import jax.numpy as jnp

from sit_jax.errors import UserError
from sit_jax.models.layers import DTYPES, choose
from sit_jax.models.vae_layers import (
    Double,
    Middle,
    Norm,
    Residual,
    conv,
    halve,
    pointwise,
)

TILED = 2  # resolutions, the highest ones, that take nearly all of the memory


class AutoencoderKL(nn.Module):
    """Fields default to sd-vae-ft-mse: 83,653,863 parameters."""

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2  # residual blocks at each resolution; the decoder has one more
    latent: int = 4
    groups: int = 32  # of channels that are normalized together
    dtype: str = "float32"

    def setup(self):
        _check(self)
        dtype = choose(DTYPES, self.dtype, "dtype")
        self.encoder = Encoder(
            self.channels, self.layers, self.latent, self.groups, dtype
        )
        self.decoder = Decoder(self.channels, self.layers, self.groups, dtype)

    @property
    def factor(self):
        """Pixels along one side of a latent."""
        return 2 ** (len(self.channels) - 1)

    def encode(self, images):
        """[B, H, W, 3] in [-1, 1] -> moments [B, h, w, 2C] float32: mean, log var."""
        for side in images.shape[1:3]:
            if side % self.factor:
                raise UserError(
                    f"images of {images.shape[1]} x {images.shape[2]} pixels: the VAE "
                    f"needs sides divisible by {self.factor}; crop or resize them"
                )
        return self.encoder(images)

    def decode(self, latents):
        """[B, h, w, C], unscaled -> images [B, H, W, 3] float32, about in [-1, 1]."""
        return self.decoder(latents)

    def begin(self, latents):
        """The decoder as far as TILED allows: [B, h, w, C] -> features [B, .., .., D].

        In it every pixel sees every other.
        """
        return self.decoder.begin(latents)

    def finish(self, features):
        """The rest: -> images. But for its norms a pixel sees only 22 others away."""
        return self.decoder.finish(features)

    def __call__(self, images):
        """Through both halves, by the mean: what creates all parameters."""
        return self.decode(jnp.split(self.encode(images), 2, axis=-1)[0])


class Encoder(nn.Module):
    channels: tuple[int, ...]
    layers: int
    latent: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        size, last = (self.groups, self.dtype), len(self.channels) - 1
        x = conv(self.channels[0], "conv_in", self.dtype)(x)
        for i, width in enumerate(self.channels):
            for j in range(self.layers):
                x = Residual(width, *size, name=f"down_{i}_{j}")(x)
            if i < last:
                x = halve(width, f"halve_{i}", self.dtype)(x)
        x = Middle(*size, name="middle")(x)
        x = nn.silu(Norm(self.groups, name="norm_out")(x))
        x = conv(2 * self.latent, "conv_out")(x)
        return pointwise(2 * self.latent, "quant")(x)


class Decoder(nn.Module):
    channels: tuple[int, ...]
    layers: int
    groups: int
    dtype: jnp.dtype

    def setup(self):
        size = (self.channels, self.layers, self.groups, self.dtype)
        self.begin, self.finish = Begin(*size), Finish(*size)

    def __call__(self, z):
        return self.finish(self.begin(z))


class Begin(nn.Module):
    channels: tuple[int, ...]
    layers: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, z):
        x = pointwise(z.shape[-1], "post_quant")(z)
        x = conv(self.channels[-1], "conv_in", self.dtype)(x)
        x = Middle(self.groups, self.dtype, name="middle")(x)
        return climb(self, x, range(first_tiled(self)))


class Finish(nn.Module):
    channels: tuple[int, ...]
    layers: int
    groups: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        x = climb(self, x, range(first_tiled(self), len(self.channels)))
        x = nn.silu(Norm(self.groups, name="norm_out")(x))
        return conv(3, "conv_out")(x)


def first_tiled(model):
    """Number of the first of the decoder's resolutions that tiles may have."""
    return max(len(model.channels) - TILED, 0)


def climb(part, x, levels):
    """Through some of the decoder's resolutions, counted from the lowest."""
    for i in levels:
        if i > 0:
            x = Double(part.dtype, name=f"double_{i}")(x)
        for j in range(part.layers + 1):
            width = part.channels[-1 - i]
            x = Residual(width, part.groups, part.dtype, name=f"up_{i}_{j}")(x)
    return x


def _check(model):
    for name in ("layers", "latent", "groups"):
        if (value := getattr(model, name)) < 1:
            raise UserError(f"the VAE's {name} is {value}: it must be at least 1")
    for width in model.channels:
        if width % model.groups:
            raise UserError(
                f"the VAE's width {width} is not divisible by groups {model.groups}"
            )
