"""Statistics of a set of images' features, and files of them.

Statistics files are .npz with ADM's names: mu [D], sigma [D, D], and mu_s, sigma_s of
the spatial features. Ours add `pool`, features for precision, recall and KID, and a
`record` of count and pipeline. ADM's have images (arr_0) in their place.
"""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

from sit_jax.errors import UserError
from sit_jax.evaluation.features import INCEPTION, Batch, Pipeline, read_record
from sit_jax.evaluation.fid import Gaussian, RunningMoments
from sit_jax.evaluation.metrics import InceptionScore
from sit_jax.files import PathLike, atomic_write
from sit_jax.sampling.outputs import ArrayFile

ADM = INCEPTION | {
    "library": "guided-diffusion",
    "weights": "of the released graph",
    "released": True,
}
UNKNOWN = {"library": "unknown; pytorch-fid's files look like this"}


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """What is known of the features of a set of images; None where it is not.

    Attributes:
      count: images.
      pool: Gaussian of the features that FID is computed of.
      spatial: Gaussian of the features that sFID is computed of.
      score: Inception Score.
      features: those of the first M images.
      pipeline: what made the features.
      is_inception: whether they are Inception's; None if a file does not say.
    """

    count: int | None
    pool: Gaussian
    spatial: Gaussian | None = None
    score: float | None = None
    features: Float[np.ndarray, "m d"] | None = None
    pipeline: Pipeline | None = None
    is_inception: bool | None = True

    @property
    def widths(self) -> dict[str, int]:
        """How many numbers the features have, by name."""
        parts = {"pool": self.pool, "spatial": self.spatial}
        return {name: len(part.mean) for name, part in parts.items() if part}


def collect_statistics(
    batches: Iterable[Batch],
    count: int,
    *,
    keep: int | None = None,
    pipeline: Pipeline | None = None,
    is_inception: bool = True,
) -> FeatureStatistics:
    """Adds up batches of features as they come.

    Args:
      batches: features of all images.
      count: how many images there must be.
      keep: how many features the result holds; None means all.
      pipeline: what made the features.
      is_inception: whether they are Inception's.
    """
    moments: dict[str, RunningMoments] = {}
    for batch in batches:
        if not moments:
            widths = {name: part.shape[1] for name, part in batch.items()}
            names = [name for name in ("pool", "spatial") if name in widths]
            moments = {name: RunningMoments(widths[name]) for name in names}
            score = InceptionScore() if "logits" in widths else None
            kept = count if keep is None else min(keep, count)
            features = np.empty((kept, widths["pool"]), np.float32)
        start = moments["pool"].count
        rows = features[start : start + len(batch["pool"])]
        rows[:] = batch["pool"][: len(rows)]
        for name, running in moments.items():
            running.add(batch[name])
        if score is not None:
            score.add(batch["logits"])
    total = moments["pool"].count if moments else 0
    if total != count or count < 2:
        raise UserError(f"{total} features of {count} images; at least 2 are needed")
    return FeatureStatistics(
        count=count,
        pool=moments["pool"].gaussian(),
        spatial=moments["spatial"].gaussian() if "spatial" in moments else None,
        score=score and score.value(),
        features=features,
        pipeline=pipeline,
        is_inception=is_inception,
    )


def save_statistics(
    path: PathLike, statistics: FeatureStatistics, record: dict[str, Any]
) -> None:
    """Writes a statistics file; record: more that is known, besides the pipeline."""
    arrays = {"mu": statistics.pool.mean, "sigma": statistics.pool.cov}
    if statistics.spatial is not None:
        arrays |= {"mu_s": statistics.spatial.mean, "sigma_s": statistics.spatial.cov}
    if statistics.features is not None:
        arrays["pool"] = statistics.features
    own = {
        "count": statistics.count,
        "pipeline": statistics.pipeline,
        "inception_score": statistics.score,
        "is_inception": statistics.is_inception,
    }
    with atomic_write(path) as name:
        np.savez(name, **arrays, record=np.array(json.dumps(own | record)))


def load_statistics(path: PathLike) -> FeatureStatistics:
    """Reads a statistics file, ours or ADM's."""
    file = ArrayFile(path)
    record = read_record(file)
    pool = _gaussian(file, "mu", "sigma")
    spatial = None
    if "mu_s" in file or "sigma_s" in file:
        spatial = _gaussian(file, "mu_s", "sigma_s")
    is_adm = "arr_0" in file and spatial is not None
    features = file.array("pool") if "pool" in file else None
    if features is not None and features.shape[1:] != pool.mean.shape:
        raise UserError(f"{file.path}: pool and mu are of different features")
    return FeatureStatistics(
        count=record.get("count"),
        pool=pool,
        spatial=spatial,
        score=record.get("inception_score"),
        features=features,
        pipeline=record.get("pipeline", ADM if is_adm else None if record else UNKNOWN),
        is_inception=record.get("is_inception", True if is_adm else None),
    )


def _gaussian(file, mu, sigma):
    mean, cov = (file.member(name) for name in (mu, sigma))
    shapes = f"{mu} {list(mean.shape)} and {sigma} {list(cov.shape)}"
    if len(mean.shape) != 1 or cov.shape != mean.shape * 2:
        raise UserError(f"{file.path}: {shapes} are no mean and covariance")
    mean, cov = (np.asarray(file.array(name), np.float64) for name in (mu, sigma))
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise UserError(f"{file.path}: {mu} or {sigma} has values that are no number")
    if (np.diagonal(cov) < 0).any() or not np.allclose(cov, cov.T, rtol=1e-3):
        raise UserError(
            f"{file.path}: {sigma} is no covariance: it must be symmetric, and its "
            "diagonal not negative"
        )
    return Gaussian(mean, cov)
