"""Between images and what the network sees: image -> moments -> data -> image.

`encode` is worth caching, `sample` draws anew at every step. A codec is a pytree, so
that its weights are arguments of jitted functions and not constants inside them.

Pictures come from numbers by the rules of the originals' sampling scripts. Reference
statistics of samples depend on the rule, so a manifest names it.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, UInt8

from sit_jax.errors import UserError
from sit_jax.manifest import weights_hash
from sit_jax.models.vae import AutoencoderKL
from sit_jax.precision.policy import EXACT, Precision, with_precision
from sit_jax.ranges import Above

SCALE = 0.18215  # of Stable Diffusion's latents, to unit variance
_static = partial(struct.field, pytree_node=False)


def to_uint8(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Returns [-1, 1] as bytes by the rule of DiT's and SiT's scripts.

    They clamp 127.5 x + 128 to 0..255 and truncate, in float32: bfloat16 has no 256
    levels.
    """
    return jnp.clip(127.5 * x.astype(jnp.float32) + 128, 0, 255).astype(jnp.uint8)


def to_uint8_mdt(x: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """Returns [-1, 1] as bytes by the rule of MDT's scripts.

    They truncate (x + 1) 127.5, which is half a level less.
    """
    return jnp.clip((x.astype(jnp.float32) + 1) * 127.5, 0, 255).astype(jnp.uint8)


ROUNDINGS = {"dit": to_uint8, "mdt": to_uint8_mdt}
_OLD_NAMES = {"brighter": "dit", "darker": "mdt"}  # in manifests of version 0.1


def get_rounding(name: str) -> Callable[[Array], Array]:
    """Returns the rule of that name.

    Raises:
      UserError: there is no such rule.
    """
    name = _OLD_NAMES.get(name, name)
    if name not in ROUNDINGS:
        raise UserError(f"--rounding {name!r}: {' or '.join(ROUNDINGS)}")
    return ROUNDINGS[name]


def rounding_name(rule: Callable[[Array], Array]) -> str:
    """Returns a rule's name in ROUNDINGS, or else the function's own."""
    names: dict[Any, str] = {function: name for name, function in ROUNDINGS.items()}
    return names.get(rule, rule.__name__)


def codec_sample(
    codec: Any, key: Array, batch: Mapping[str, Array]
) -> Float[Array, "b h w c"]:
    """Returns data from whatever a batch holds: "latent", "moments" or "image"."""
    if "latent" in batch:
        return batch["latent"]
    moments = batch["moments"] if "moments" in batch else codec.encode(batch["image"])
    return codec.sample(key, moments)


def sample_posterior(
    key: Array, moments: Float[Array, "b h w 2*c"]
) -> Float[Array, "b h w c"]:
    """Draws from Stable Diffusion's posterior, whose log variance it bounds.

    Args:
      key: random key.
      moments: means, then log variances.
    """
    mean, log_var = jnp.split(moments, 2, axis=-1)
    std = jnp.exp(jnp.clip(log_var, -30, 20) / 2)
    return mean + std * jax.random.normal(key, mean.shape)


class Pixels(struct.PyTreeNode):
    """The network sees the pixels themselves, from -1 to 1."""

    rounding: Callable = _static(default=to_uint8)
    scale: ClassVar[None] = None
    encoder_sha256: ClassVar[None] = None

    def encode(self, images: UInt8[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        """Returns images as numbers in [-1, 1]."""
        return images.astype(jnp.float32) / 127.5 - 1

    def sample(self, key: Array, moments: Array) -> Array:
        """Returns the moments: there is nothing to draw."""
        del key
        return moments

    def decode(self, data: Float[Array, "b h w c"]) -> UInt8[Array, "b h w c"]:
        """Returns data as bytes."""
        return self.rounding(data)

    def record(self) -> dict[str, Any]:
        """Returns what a manifest says of it."""
        return {}


class Latents(struct.PyTreeNode):
    """Latents that were made elsewhere; there is no VAE to go to images and back."""

    scale: Annotated[float, Above(0.0)] = _static(default=SCALE)
    rounding: Callable = _static(default=to_uint8)  # for the VAE that takes its place
    encoder_sha256: ClassVar[None] = None

    def encode(self, images: Array) -> Array:
        """Refuses images.

        Raises:
          UserError: always.
        """
        raise UserError(
            "images need a VAE to become latents; give latents or moments as data"
        )

    def sample(
        self, key: Array, moments: Float[Array, "b h w 2*c"]
    ) -> Float[Array, "b h w c"]:
        """Draws latents of about unit variance."""
        return self.scale * sample_posterior(key, moments)

    def decode(self, data: Array) -> Array:
        """Refuses latents.

        Raises:
          UserError: always.
        """
        raise UserError("latents need a VAE to become pictures; --out x.npy keeps them")

    def record(self) -> dict[str, Any]:
        """Returns what a manifest says of it."""
        return {}


class Vae(struct.PyTreeNode):
    """Latents of an autoencoder whose weights are at hand; see convert's load_vae.

    Attributes:
      params: {"encoder": .., "decoder": ..}.
      model: the network that they belong to.
      scale: what latents are multiplied by for about unit variance.
      rounding: how numbers become bytes.
      precision: what the network computes in.
      group: images that are decoded together; by default 1 on a CPU, which gains
        nothing from more, and 8 elsewhere.
    """

    params: Any
    model: AutoencoderKL = _static()
    scale: float = _static(default=SCALE)
    rounding: Callable = _static(default=to_uint8)
    precision: Precision = _static(default=EXACT)
    group: int | None = _static(default=None)

    @jax.jit
    def encode(self, images: UInt8[Array, "b H W 3"]) -> Float[Array, "b h w 2*c"]:
        """Returns moments: means, then log variances; h is H / 8."""
        return self._apply("encode", Pixels().encode(images))

    def sample(
        self, key: Array, moments: Float[Array, "b h w 2*c"]
    ) -> Float[Array, "b h w c"]:
        """Draws latents of about unit variance."""
        return self.scale * sample_posterior(key, moments)

    @jax.jit
    def decode(self, data: Float[Array, "b h w c"]) -> UInt8[Array, "b H W 3"]:
        """Returns images of latents of about unit variance."""
        latents = data.astype(jnp.float32) / self.scale
        to_images = lambda rows: self.rounding(self._apply("decode", rows))
        size = self.group or (1 if jax.default_backend() == "cpu" else 8)
        return _map_groups(to_images, latents, size)

    def _apply(self, method: str, x: Array) -> Array:
        apply = partial(self.model.apply, {"params": self.params}, method=method)
        return with_precision(self.precision, apply)(x)

    @property
    def encoder_sha256(self) -> str:
        """The hash of the encoder; two editions can share it, and cached latents."""
        return weights_hash(self.params["encoder"])

    @property
    def decoder_sha256(self) -> str:
        """The hash of the decoder."""
        return weights_hash(self.params["decoder"])

    def record(self) -> dict[str, Any]:
        """Returns what a manifest says of it."""
        return {
            "encoder_sha256": self.encoder_sha256,
            "decoder_sha256": self.decoder_sha256,
            "scale": self.scale,
            "rounding": self.rounding.__name__,
            "precision": self.precision.name,
        }


def _map_groups(fn, x, size):
    """Returns fn of x [b, ...], always of `size` rows at a time.

    The code of a convolution, and so its last bits, depends on the number of rows; with
    one shape an image does not depend on how many are beside it. A group takes its rows
    from all over the batch: each stays on its device where the batch is split.
    """
    rows, missing = len(x), -len(x) % size
    x = jnp.concatenate([x, x[:1].repeat(missing, 0)]).reshape(size, -1, *x.shape[1:])
    out = jax.lax.map(fn, x.swapaxes(0, 1)).swapaxes(0, 1)
    return out.reshape(-1, *out.shape[2:])[:rows]
