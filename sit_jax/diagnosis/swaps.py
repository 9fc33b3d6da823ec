"""From A's pictures to B's, one component of the way exchanged after the other.

What A and B need for it are the latents that both have sampled, as sample.py --out
x.npy leaves them, and manifests that say how they become pictures.
"""

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax import config as configs
from sit_jax.errors import UserError
from sit_jax.evaluation.image_sets import batch_starts, input_of_images
from sit_jax.experiment import build_experiment
from sit_jax.models.codec import Latents
from sit_jax.parallel.mesh import make_mesh
from sit_jax.sampling.job import SamplingJob
from sit_jax.sampling.noise import read_noise
from sit_jax.sampling.run import with_codec


class Decoded:
    """Latents float32 [N, H, W, C] of a .npy, seen as uint8 images by a codec.

    A set as in image_sets.py; grey counts as coloured.
    """

    def __init__(self, path, codec, latents):
        self.path, self.codec, self._latents = path, codec, latents
        made = jax.eval_shape(codec.decode, jnp.zeros((1, *latents.shape[1:])))
        if made.shape[-1] not in (1, 3):
            raise UserError(f"{path}: {made.shape[-1]} channels do not make a picture")
        self.shape = (*made.shape[1:3], 3)

    def __len__(self):
        return len(self._latents)

    def batches(self, size, numbers=None):
        for start in batch_starts(len(self), size, numbers):
            images = _decode(
                self.codec, jnp.asarray(self._latents[start : start + size])
            )
            yield np.broadcast_to(images, (*images.shape[:3], 3))

    def of(self, path, flag):
        """Other latents of the same network, by the same codec; flag: that names it."""
        latents = read_noise(path, self._latents.shape[1:], flag)
        return Decoded(path, self.codec, latents)

    def by(self, codec):
        """The same latents through another codec."""
        return Decoded(self.path, codec, self._latents)


def decoded(path, manifest):
    """-> Decoded of a .npy whose manifest says by which VAE; None without a VAE."""
    job = SamplingJob.from_json(manifest["job"], path)
    config = configs.from_json(job.config)
    parts, mesh = (
        build_experiment(config),
        make_mesh(1, 1, devices=jax.local_devices()[:1]),
    )
    parts, _ = with_codec(parts, job, config.precision.vae, mesh)
    if isinstance(parts.codec, Latents):
        return None
    return Decoded(path, parts.codec, read_noise(path, parts.shape, "latents"))


def exchanged(a, b, between=None, same_start=False):
    """Decoded A and B -> [(what was exchanged, Decoded)], A first and B last.

    between: latents of A's network from B's noise and labels, Decoded by A's codec.
    same_start: A and B began from the same noise and labels.
    """
    if a.codec.rounding is b.codec.rounding:
        half = b
    else:
        half = b.by(b.codec.replace(rounding=a.codec.rounding))
    chain = [("A", a)]
    if same_start or between is not None:
        chain.append(("noise and labels", a if between is None else between))
    name = "latents" if len(chain) == 2 else "noise, labels and latents"
    return [*chain, (name, b.by(a.codec)), ("decode", half), ("rounding", b)]


def exchanged_sides(a, b, same_start, width, between=None):
    """Sides -> [(what was exchanged, Side)]; of other than latents only the first.

    between: a path of latents, see exchanged; width: see evaluated.open_input.
    """
    sets = [getattr(each.source, "images", None) for each in (a, b)]
    if not all(isinstance(images, Decoded) for images in sets):
        if between:
            raise UserError(f"--swapped {between} goes with latents (.npy) as A and B")
        return [("A", a)]
    known = {id(images): side for images, side in zip(sets, (a, b), strict=True)}
    swapped = between and sets[0].of(between, "--swapped")
    if swapped and len(swapped) != len(sets[1]):
        raise UserError(
            f"--swapped {between} has {len(swapped)} latents, B {len(sets[1])}: it is "
            "what A's network makes of B's noise and labels"
        )
    found = exchanged(*sets, swapped, same_start)
    side_of = lambda images: known.get(id(images)) or input_of_images(images, width)
    return [(name, side_of(images)) for name, images in found]


@jax.jit
def _decode(codec, latents):
    return codec.decode(latents)
