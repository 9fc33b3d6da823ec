"""Goes from A's pictures to B's, by exchanging one component after the other.

What A and B need for it are the latents that both have sampled, as sample.py --out
x.npy leaves them, and manifests that say how they become pictures.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from sit_jax import config as configs
from sit_jax.errors import UserError
from sit_jax.evaluation.image_sets import Images, Numbers, batch_starts
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
      latents: float32 [n, h, w, c].
      shape: (h, w, 3) of an image.
    """

    def __init__(
        self, path: PathLike, codec: Any, latents: Float[np.ndarray, "n h w c"]
    ):
        self.path, self.codec, self.latents = path, codec, latents
        image = jax.eval_shape(codec.decode, jnp.zeros((1, *latents.shape[1:])))
        if image.shape[-1] not in (1, 3):
            raise UserError(f"{path}: {image.shape[-1]} channels do not make a picture")
        self.shape = (*image.shape[1:3], 3)

    def __len__(self) -> int:
        return len(self.latents)

    def batches(self, size: int, numbers: Numbers = None) -> Images:
        """Yields images in batches, see image_sets.batch_starts."""
        for start in batch_starts(len(self), size, numbers):
            latents = jnp.asarray(self.latents[start : start + size])
            images = _decode(self.codec, latents)
            yield np.broadcast_to(images, (*images.shape[:3], 3))


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
    swapped: PathLike | None = None,
    same_start: bool = False,
) -> list[tuple[str, DecodedLatents]]:
    """Exchanges A's components for B's, one after the other.

    Args:
      a: images of A.
      b: images of B.
      swapped: a path of latents that A's network makes of B's noise and labels.
      same_start: whether A and B began from the same noise and labels.

    Returns:
      What was exchanged, and the images; A first and B last.
    """
    chain, name = [("A", a)], "noise, labels and latents"
    if swapped is not None:
        latents = read_noise(swapped, a.latents.shape[1:], "--swapped")
        if len(latents) != len(b):
            raise UserError(
                f"--swapped {swapped} has {len(latents)} latents, B {len(b)}: it is "
                "what A's network makes of B's noise and labels"
            )
        chain.append(("noise and labels", DecodedLatents(swapped, a.codec, latents)))
    elif same_start:
        chain.append(("noise and labels", a))
    if len(chain) > 1:
        name = "latents"
    chain.append((name, DecodedLatents(b.path, a.codec, b.latents)))
    decoded = b
    if a.codec.rounding is not b.codec.rounding:
        codec = b.codec.replace(rounding=a.codec.rounding)
        decoded = DecodedLatents(b.path, codec, b.latents)
    return [*chain, ("decode", decoded), ("rounding", b)]


@jax.jit
def _decode(codec, latents):
    return codec.decode(latents)
