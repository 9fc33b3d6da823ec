"""Goes from A's pictures to B's, by exchanging one component after the other.

What A and B need for it are the latents that both have sampled, as sample.py --out
x.npy leaves them, and manifests that say how they become pictures.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from sit_jax import config as configs
from sit_jax.errors import UserError
from sit_jax.evaluation.image_sets import (
    EvaluationInput,
    ImageFeatures,
    batch_starts,
    input_of_images,
)
from sit_jax.experiment import build_experiment
from sit_jax.files import PathLike
from sit_jax.models.codec import Latents
from sit_jax.parallel.mesh import make_mesh
from sit_jax.sampling.job import SamplingJob
from sit_jax.sampling.noise import read_noise
from sit_jax.sampling.run import with_codec


class DecodedLatents:
    """An image set of latents that a codec decodes; grey is repeated to three channels.

    Attributes:
      path: of the latents.
      codec: what decodes them.
      shape: (h, w, 3) of an image.
    """

    def __init__(
        self, path: PathLike, codec: Any, latents: Float[np.ndarray, "n h w c"]
    ):
        self.path, self.codec, self._latents = path, codec, latents
        image = jax.eval_shape(codec.decode, jnp.zeros((1, *latents.shape[1:])))
        if image.shape[-1] not in (1, 3):
            raise UserError(f"{path}: {image.shape[-1]} channels do not make a picture")
        self.shape = (*image.shape[1:3], 3)

    def __len__(self) -> int:
        return len(self._latents)

    def batches(
        self, size: int, numbers: Any = None
    ) -> Iterator[UInt8[np.ndarray, "b h w 3"]]:
        """Gives images in batches, see image_sets.batch_starts."""
        for start in batch_starts(len(self), size, numbers):
            latents = jnp.asarray(self._latents[start : start + size])
            images = _decode(self.codec, latents)
            yield np.broadcast_to(images, (*images.shape[:3], 3))

    def with_latents(self, path: PathLike, flag: str) -> "DecodedLatents":
        """Returns other latents of the same network; `flag` is what named them."""
        latents = read_noise(path, self._latents.shape[1:], flag)
        return DecodedLatents(path, self.codec, latents)

    def with_codec(self, codec: Any) -> "DecodedLatents":
        """Returns the same latents with another codec."""
        return DecodedLatents(self.path, codec, self._latents)


def decode_latents(path: PathLike, manifest: dict[str, Any]) -> DecodedLatents | None:
    """Returns the images of a .npy of latents, None if its manifest names no VAE."""
    job = SamplingJob.from_json(manifest["job"], path)
    config = configs.from_json(job.config)
    experiment = build_experiment(config)
    mesh = make_mesh(1, 1, devices=jax.local_devices()[:1])
    experiment, _ = with_codec(experiment, job, config.precision.vae, mesh)
    if isinstance(experiment.codec, Latents):
        return None
    latents = read_noise(path, experiment.shape, "latents")
    return DecodedLatents(path, experiment.codec, latents)


def swap_components(
    a: DecodedLatents,
    b: DecodedLatents,
    between: DecodedLatents | None = None,
    same_start: bool = False,
) -> list[tuple[str, DecodedLatents]]:
    """Exchanges A's components for B's, one after the other.

    Args:
      a: images of A.
      b: images of B.
      between: what A's network makes of B's noise and labels, with A's codec.
      same_start: whether A and B began from the same noise and labels.

    Returns:
      What was exchanged, and the images; A first and B last.
    """
    decoded = b
    if a.codec.rounding is not b.codec.rounding:
        decoded = b.with_codec(b.codec.replace(rounding=a.codec.rounding))
    chain, name = [("A", a)], "noise, labels and latents"
    if same_start or between is not None:
        chain.append(("noise and labels", a if between is None else between))
        name = "latents"
    return [
        *chain,
        (name, b.with_codec(a.codec)),
        ("decode", decoded),
        ("rounding", b),
    ]


def swap_inputs(
    a: EvaluationInput,
    b: EvaluationInput,
    *,
    same_start: bool,
    width: int,
    swapped: PathLike | None = None,
) -> list[tuple[str, EvaluationInput]]:
    """Exchanges A's components for B's where both are latents; else returns only A.

    Args:
      a: the input of A.
      b: the input of B.
      same_start: whether A and B began from the same noise and labels.
      width: of the features, see image_sets.open_input.
      swapped: a path of latents that A's network makes of B's noise and labels.

    Returns:
      What was exchanged, and the input.
    """
    images = [_latents_of(side) for side in (a, b)]
    if None in images:
        if swapped:
            raise UserError(f"--swapped {swapped} goes with latents (.npy) as A and B")
        return [("A", a)]
    between = None
    if swapped:
        between = images[0].with_latents(swapped, "--swapped")
        if len(between) != len(images[1]):
            raise UserError(
                f"--swapped {swapped} has {len(between)} latents, B {len(images[1])}: "
                "it is what A's network makes of B's noise and labels"
            )
    sides = {id(images[0]): a, id(images[1]): b}
    chain = swap_components(*images, between, same_start)
    return [
        (name, sides.get(id(decoded)) or input_of_images(decoded, width))
        for name, decoded in chain
    ]


def _latents_of(side):
    is_images = isinstance(side.source, ImageFeatures)
    images = side.source.images if is_images else None
    return images if isinstance(images, DecodedLatents) else None


@jax.jit
def _decode(codec, latents):
    return codec.decode(latents)
