"""Networks that pictures are judged by, under their names on the command line."""

import dataclasses
import functools

import numpy as np

from sit_jax.convert import inception
from sit_jax.errors import UserError
from sit_jax.evaluation.digit_features import WIDTHS, DigitFeatures
from sit_jax.evaluation.evaluated import open_side
from sit_jax.evaluation.features import inception_extractor
from sit_jax.evaluation.metrics.gaussian import Gaussian
from sit_jax.parallel.mesh import make_mesh


@functools.cache
def judge(name, weights=None, batch_size=64):
    """-> an Extractor; name: of digit_features.WIDTHS; weights: a path, of Inception's.

    Made once, for it compiles.
    """
    if name == "digits":
        return DigitFeatures()
    found = inception.load_inception(weights)
    return inception_extractor(found, make_mesh(data=-1, fsdp=1), batch_size)


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """What a judge makes of the sides of a comparison; fields as of judge()."""

    name: str
    weights: str | None = None
    batch_size: int = 64

    @property
    def width(self):
        """Numbers in a feature."""
        return WIDTHS[self.name]

    def extractor(self):
        return judge(self.name, self.weights, self.batch_size)

    def side(self, path):
        """-> evaluated.Side"""
        return open_side(path, width=self.width)

    def features(self, side):
        """-> [N, D] of a Side, by the network where they are not stored."""
        source = side.source
        if source is None:
            raise UserError(f"{side.path} holds statistics; samples need all features")
        extractor = self.extractor() if source.needs_network else None
        return np.concatenate([batch["pool"] for batch in source.features(extractor)])

    def gaussian(self, path):
        """-> Gaussian of statistics, or of all features."""
        side = self.side(path)
        if side.summary is not None:
            return side.summary.pool
        return Gaussian.of(self.features(side))
