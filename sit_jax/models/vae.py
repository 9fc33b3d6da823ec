"""Stable Diffusion's autoencoder: images to a Gaussian over latents an eighth as wide.

Rombach et al., arXiv:2112.10752, in the sizes and with the arithmetic of diffusers'
AutoencoderKL, whose ft-mse and ft-ema editions SiT, DiT and MDT were trained on.
Spatial sizes are free. `dtype` is what convolutions and the residual stream run in;
parameters, norms and outputs are float32.

Shapes: b images, h and w pixels of the resolution at hand, d features.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax.typing import Dtype
from jaxtyping import Array, Float

from sit_jax.errors import UserError
from sit_jax.models.attention import attention
from sit_jax.models.layers import DTYPES, choose

MAX_QUERIES = 4096  # that attend at a time: more would need too large a table of scores


class AutoencoderKL(nn.Module):
    """The autoencoder; fields default to sd-vae-ft-mse: 83,653,863 parameters.

    Attributes:
      channels: features at each resolution, from the highest.
      layers: residual blocks at each resolution; the decoder has one more.
      latent: channels of a latent.
      groups: of channels that are normalized together.
      dtype: "float32" or "bfloat16".
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    latent: int = 4
    groups: int = 32
    dtype: str = "float32"

    def setup(self) -> None:
        dtype = choose(DTYPES, self.dtype, "dtype")
        self.encoder = Encoder(
            self.channels, self.layers, self.latent, self.groups, dtype
        )
        self.decoder = Decoder(self.channels, self.layers, self.groups, dtype)

    @property
    def factor(self) -> int:
        """Pixels along one side of a latent."""
        return 2 ** (len(self.channels) - 1)

    def encode(
        self, images: Float[Array, "b h w 3"]
    ) -> Float[Array, "b h//8 w//8 2*c"]:
        """Returns moments: means, then log variances.

        Args:
          images: in [-1, 1].

        Raises:
          UserError: a side is not divisible by the factor.
        """
        height, width = images.shape[1:3]
        if height % self.factor or width % self.factor:
            raise UserError(
                f"images of {height} x {width} pixels: the VAE needs sides divisible "
                f"by {self.factor}; crop or resize them"
            )
        return self.encoder(images)

    def decode(self, latents: Float[Array, "b h w c"]) -> Float[Array, "b 8*h 8*w 3"]:
        """Returns images, about in [-1, 1], of latents that are not scaled."""
        return self.decoder(latents)

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        """Runs both halves, by the mean: what creates all parameters."""
        return self.decode(jnp.split(self.encode(images), 2, axis=-1)[0])


class Encoder(nn.Module):
    """Images to moments."""

    channels: tuple[int, ...]
    layers: int
    latent: int
    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b h//8 w//8 2*c"]:
        x = conv3x3(self.channels[0], "conv_in", self.dtype)(x)
        for i, width in enumerate(self.channels):
            for j in range(self.layers):
                x = Residual(width, self.groups, self.dtype, name=f"down_{i}_{j}")(x)
            if i < len(self.channels) - 1:
                x = downsample(width, f"halve_{i}", self.dtype)(x)
        x = Middle(self.groups, self.dtype, name="middle")(x)
        x = nn.silu(group_norm(self.groups, "norm_out")(x))
        x = conv3x3(2 * self.latent, "conv_out")(x)
        return conv1x1(2 * self.latent, "quant")(x)


class Decoder(nn.Module):
    """Latents to images.

    Its halves are modules because "begin" and "finish" stand in the names of the
    parameters, of which manifests keep a hash.
    """

    channels: tuple[int, ...]
    layers: int
    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, z: Float[Array, "b h w c"]) -> Float[Array, "b 8*h 8*w 3"]:
        half = partial(DecoderHalf, self.channels, self.layers, self.groups, self.dtype)
        return half(is_first=False, name="finish")(half(is_first=True, name="begin")(z))


class DecoderHalf(nn.Module):
    """The decoder's attention and low resolutions, or its two highest ones."""

    channels: tuple[int, ...]
    layers: int
    groups: int
    dtype: Dtype
    is_first: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w _"]) -> Float[Array, "b _ _ d"]:
        split = max(len(self.channels) - 2, 0)  # resolutions of the first half
        if self.is_first:
            x = conv1x1(x.shape[-1], "post_quant")(x)
            x = conv3x3(self.channels[-1], "conv_in", self.dtype)(x)
            x = Middle(self.groups, self.dtype, name="middle")(x)
            return _ascend(self, x, range(split))
        x = _ascend(self, x, range(split, len(self.channels)))
        x = nn.silu(group_norm(self.groups, "norm_out")(x))
        return conv3x3(3, "conv_out")(x)


def _ascend(decoder, x, levels):
    """Runs some of the decoder's resolutions, counted from the lowest."""
    for i in levels:
        if i > 0:
            x = Upsample(decoder.dtype, name=f"double_{i}")(x)
        for j in range(decoder.layers + 1):
            width = decoder.channels[-1 - i]
            x = Residual(width, decoder.groups, decoder.dtype, name=f"up_{i}_{j}")(x)
    return x


class Residual(nn.Module):
    """Two norms and convolutions beside a shortcut, to `width` features."""

    width: int
    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w _"]) -> Float[Array, "b h w d"]:
        y = nn.silu(group_norm(self.groups, "norm1")(x))
        y = conv3x3(self.width, "conv1", self.dtype)(y)
        y = nn.silu(group_norm(self.groups, "norm2")(y))
        y = conv3x3(self.width, "conv2", self.dtype)(y)
        if x.shape[-1] != self.width:
            x = conv1x1(self.width, "shortcut", self.dtype)(x)
        return x + y


class Middle(nn.Module):
    """The lowest resolution, where every pixel sees every other."""

    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        width = x.shape[-1]
        x = Residual(width, self.groups, self.dtype, name="before")(x)
        x = PixelAttention(self.groups, self.dtype, name="attention")(x)
        return Residual(width, self.groups, self.dtype, name="after")(x)


class PixelAttention(nn.Module):
    """Self-attention between pixels, of one head as wide as there are channels."""

    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b h w d"]:
        b, _, _, d = x.shape
        y = group_norm(self.groups, "norm")(x).reshape(b, -1, 1, d)
        q, k, v = (nn.Dense(d, dtype=self.dtype, name=name)(y) for name in "qkv")
        if q.shape[1] > MAX_QUERIES:
            one_query = lambda q: attention(q[:, None], k, v)[:, 0]
            rows = jax.lax.map(one_query, q.swapaxes(0, 1), batch_size=MAX_QUERIES)
            y = rows.swapaxes(0, 1)
        else:
            y = attention(q, k, v)
        y = nn.Dense(d, dtype=self.dtype, name="out")(y)
        return x + y.reshape(x.shape)


class Upsample(nn.Module):
    """Repeats every pixel twice along both sides, then applies a 3 x 3 kernel.

    It is computed before the repetition: an output pixel sees only 2 x 2 different
    inputs, through sums of the kernel's entries, so 4 products do the work of 9.
    """

    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w d"]) -> Float[Array, "b 2*h 2*w d"]:
        width = x.shape[-1]
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (3, 3, width, width))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        x = x.astype(self.dtype)
        rows = _split_kernel(kernel, 0)
        kernels = [_split_kernel(row, 1) for row in rows]
        pixels = [
            [self._phase(x, kernels[row][column], row, column) for column in (0, 1)]
            for row in (0, 1)
        ]
        x = rearrange(jnp.asarray(pixels), "p q b h w d -> b (h p) (w q) d")
        return x + bias.astype(self.dtype)[None, None, None]

    def _phase(self, x, kernel, row, column):
        """Returns the output pixels whose row and column are even (0) or odd (1)."""
        padding = ((1 - row, row), (1 - column, column))
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, kernel.astype(self.dtype), (1, 1), padding, dimension_numbers=layout
        )


def _split_kernel(kernel, axis):
    """Returns kernels of 2 entries along an axis of 3, for even and for odd pixels."""
    first, middle, last = jnp.split(kernel, 3, axis)
    even, odd = (first, middle + last), (first + middle, last)
    return jnp.concatenate(even, axis), jnp.concatenate(odd, axis)


def group_norm(groups: int, name: str) -> nn.GroupNorm:
    """Returns a group norm in float32.

    It takes two passes: E[x^2] - E[x]^2, which torch takes on a CPU where channels are
    last in memory, cancels in float32.
    """
    return nn.GroupNorm(
        groups, epsilon=1e-6, use_fast_variance=False, dtype=jnp.float32, name=name
    )


def conv3x3(width: int, name: str, dtype: Dtype = jnp.float32) -> nn.Conv:
    """Returns a convolution that keeps the sides."""
    return nn.Conv(width, (3, 3), padding=1, dtype=dtype, name=name)


def conv1x1(width: int, name: str, dtype: Dtype = jnp.float32) -> nn.Conv:
    """Returns a linear map of each pixel."""
    return nn.Conv(width, (1, 1), dtype=dtype, name=name)


def downsample(width: int, name: str, dtype: Dtype) -> nn.Conv:
    """Returns a convolution to half the sides, padded right and at the bottom only."""
    padding = ((0, 1), (0, 1))
    return nn.Conv(width, (3, 3), (2, 2), padding, dtype=dtype, name=name)
