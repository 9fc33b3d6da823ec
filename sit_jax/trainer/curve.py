"""FID-k of the average while it is trained: always the same k noises and labels.

FID falls with the number of images, and rises without guidance; within one curve both
stay what they are.
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.config import build
from sit_jax.convert import inception_weights
from sit_jax.errors import UserError
from sit_jax.evaluation import evaluation, summary
from sit_jax.evaluation.evaluated import open_side
from sit_jax.evaluation.features import inception_extractor
from sit_jax.sampling.generation import Generator
from sit_jax.sampling.labels import labels

BATCH = 64  # images that are drawn together


class Curve:
    """Draws `count` images, each class as often, by the config's sampler and guidance.

    around: see generation.make_generate. A codec that makes no pictures is refused at
    construction. On several hosts all draw all of them.
    """

    def __init__(
        self, parts, mesh, seed, count, extractor, reference, around=lambda fn: fn
    ):
        made = jax.eval_shape(parts.codec.decode, jnp.zeros((1, *parts.shape)))
        if made.shape[-1] not in (1, 3):
            raise UserError(f"{made.shape[-1]} channels do not make a picture")
        evaluation.require_same(extractor.pipeline, reference.pipeline)
        self._labels = labels("balanced", count, parts.model.classes, seed)
        self._parts, self._mesh, self._seed = parts, mesh, seed
        self._extractor, self._reference, self._draw = extractor, reference, None
        self._around = around
        self.name = f"{'fid' if reference.is_inception else 'frechet'}_{count}"

    def __call__(self, params):
        """-> the distance, and the seconds it took, the first time with compiling."""
        begun = time.perf_counter()
        if self._draw is None:
            batch = min(len(self._labels), BATCH)
            how = {"around": self._around}
            self._draw = Generator(self._parts, params, self._mesh, batch, **how)
        drawn = self._draw(self._seed, self._labels, params=params)
        images = (_coloured(self._parts.codec.decode(data)) for data, _ in drawn)
        found = evaluation.fid(images, self._extractor, self._reference)
        return found, time.perf_counter() - begun


def curve(config, parts, mesh, around=lambda fn: fn):
    """-> Curve of a config; without weights for its features a UserError."""
    extractor = build(config.features)
    if extractor is None:
        weights = inception_weights.load()
        extractor = inception_extractor(weights, mesh, BATCH)
    reference = _reference(build(config.reference), extractor)
    count = config.evaluate_images
    return Curve(parts, mesh, config.seed, count, extractor, reference, around)


def _reference(given, extractor):
    """-> Summary of statistics, of images in a file, or of a source of them."""
    if not isinstance(given, str):
        batches, count = _images(given, extractor.batch_size), len(given)
    else:
        side = open_side(given)
        if side.summary is not None:
            return side.summary
        source = side.source
        if not source.needs_network:
            batches = source.features()
            known = (source.pipeline, source.is_inception)
            return summary.summarize(batches, source.count, 0, *known)
        batches, count = source.images.batches(extractor.batch_size), source.count
    known = extractor.pipeline, getattr(extractor, "is_inception", True)
    return summary.summarize(extractor(batches), count, 0, *known)


def _images(source, size):
    for start in range(0, len(source), size):
        rows = range(start, min(start + size, len(source)))
        yield _coloured(np.stack([source[i]["image"] for i in rows]))


def _coloured(images):
    images = np.asarray(images)
    return np.broadcast_to(images, (*images.shape[:3], 3))
