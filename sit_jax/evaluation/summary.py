"""What is kept of a set of images: statistics of its features, and some of these.

Statistics files are .npz with ADM's names: mu [D], sigma [D, D], and mu_s, sigma_s of
the spatial features. Ours add `pool`, features for precision, recall and KID, and a
`record` of count and pipeline. ADM's have images (arr_0) in their place.
"""

import dataclasses
import json

import numpy as np

from sit_jax.errors import UserError
from sit_jax.evaluation.features import INCEPTION, read_record
from sit_jax.evaluation.metrics.gaussian import Gaussian, Moments
from sit_jax.evaluation.metrics.score import InceptionScore
from sit_jax.files import atomic_write
from sit_jax.sampling.array_files import ArrayFile

ADM = INCEPTION | {
    "library": "guided-diffusion",
    "weights": "of the released graph",
    "released": True,
}
UNKNOWN = {"library": "unknown; pytorch-fid's files look like this"}


@dataclasses.dataclass(frozen=True)
class Summary:
    """What is None was not there. features [M, D]: of the first M of the images."""

    count: int | None
    pool: Gaussian
    spatial: Gaussian | None = None
    score: float | None = None  # Inception Score
    features: np.ndarray | None = None
    pipeline: dict | None = None
    is_inception: bool | None = True  # None: a file does not say

    @property
    def width(self):
        return len(self.pool.mean)

    def widths(self, extractor=None):
        """Numbers in the features, by name."""
        parts = {"pool": self.pool, "spatial": self.spatial}
        return {name: len(part.mean) for name, part in parts.items() if part}


def summarize(batches, count, keep=None, pipeline=None, is_inception=True):
    """Batches of features of `count` images -> Summary, with `keep` features in it.

    keep=None: all of them. Moments and score are added up as batches come, and a batch
    is not held beyond that.
    """
    running = None
    for batch in batches:
        if running is None:
            running = _Running(batch, count if keep is None else min(keep, count))
        running.add(batch)
    seen = running.pool.seen if running else 0
    if seen != count or count < 2:
        raise UserError(f"{seen} features of {count} images; at least 2 are needed")
    return Summary(
        count,
        running.pool.gaussian(),
        running.spatial and running.spatial.gaussian(),
        running.score and running.score.value(),
        running.kept,
        pipeline,
        is_inception,
    )


class _Running:
    """Sums over batches like the given one, and the first features."""

    def __init__(self, like, keep):
        widths = {name: part.shape[1] for name, part in like.items()}
        self.pool = Moments(widths["pool"])
        self.spatial = Moments(widths["spatial"]) if "spatial" in widths else None
        self.score = InceptionScore() if "logits" in widths else None
        self.kept = np.empty((keep, widths["pool"]), np.float32)

    def add(self, batch):
        room = self.kept[self.pool.seen :]
        room[: len(batch["pool"])] = batch["pool"][: len(room)]
        self.pool.add(batch["pool"])
        if self.spatial:
            self.spatial.add(batch["spatial"])
        if self.score:
            self.score.add(batch["logits"])


def counted(batches, update):
    """Yields batches of features, and tells update() the images in each: for a bar."""
    for batch in batches:
        yield batch
        update(len(batch["pool"]))


def save(path, summary, record):
    """Writes a statistics file; record: more that is known, besides the pipeline."""
    arrays = {"mu": summary.pool.mean, "sigma": summary.pool.cov}
    if summary.spatial is not None:
        arrays |= {"mu_s": summary.spatial.mean, "sigma_s": summary.spatial.cov}
    if summary.features is not None:
        arrays["pool"] = summary.features
    known = {
        "count": summary.count,
        "pipeline": summary.pipeline,
        "inception_score": summary.score,
        "is_inception": summary.is_inception,
    }
    with atomic_write(path) as name:
        np.savez(name, **arrays, record=np.array(json.dumps(known | record)))


def load(path):
    """A statistics file, ours or ADM's -> Summary."""
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
    return Summary(
        record.get("count"),
        pool,
        spatial,
        record.get("inception_score"),
        features,
        record.get("pipeline", ADM if is_adm else None if record else UNKNOWN),
        record.get("is_inception", True if is_adm else None),
    )


def _gaussian(file, mu, sigma):
    mean, cov = (file.member(name) for name in (mu, sigma))
    shapes = f"{mu} {list(mean.shape)} and {sigma} {list(cov.shape)}"
    if len(mean.shape) != 1 or cov.shape != mean.shape * 2:
        raise UserError(f"{file.path}: {shapes} are no mean and covariance")
    found = Gaussian(
        *(np.asarray(file.array(name), np.float64) for name in (mu, sigma))
    )
    if not (np.isfinite(found.mean).all() and np.isfinite(found.cov).all()):
        raise UserError(f"{file.path}: {mu} or {sigma} has values that are no number")
    return found
