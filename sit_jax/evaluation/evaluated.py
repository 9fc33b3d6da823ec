"""What can be evaluated: images, features that were stored, statistics.

A source has a path, a count, its pipeline where that is known, and `features`, which
yields batches; where it says `needs_network`, an Extractor makes them.
"""

import dataclasses
from pathlib import Path

from sit_jax.errors import UserError
from sit_jax.evaluation import summary
from sit_jax.evaluation.features import StoredFeatures
from sit_jax.evaluation.image_sets import FolderImages, NpzImages
from sit_jax.files import as_path, is_remote, local_path
from sit_jax.models.inception import POOL
from sit_jax.sampling.array_files import ArrayFile


class OfImages:
    """Features that a network has to make of images: Inception, or a smaller one."""

    needs_network, pipeline = True, None

    def __init__(self, images, width=POOL):
        self.images, self.path, self.count = images, images.path, len(images)
        self.width, self.is_inception = width, width == POOL

    def widths(self, extractor):
        """Numbers in the features, by name; nothing is computed."""
        return extractor.widths(self.images.shape)

    def features(self, extractor, wanted=None):
        """Yields batches of them; wanted: only these, by ascending numbers."""
        return extractor(self.images.batches(extractor.batch_size, wanted))


class OfFeatures:
    """Features from a file."""

    needs_network = False

    def __init__(self, stored):
        self._stored, self.path, self.count = stored, stored.path, len(stored)
        self.is_inception, self.pipeline = stored.is_inception, stored.pipeline
        self.width = stored.widths()["pool"]

    def widths(self, extractor=None):
        return self._stored.widths()

    def features(self, extractor=None):
        return iter(self._stored)


@dataclasses.dataclass(frozen=True)
class Side:
    """Samples or a reference: statistics that are in the file, or a source, or both.

    keys: what is taken from which arrays of the file.
    """

    path: Path
    summary: summary.Summary | None
    source: OfImages | OfFeatures | None
    keys: dict

    @property
    def known(self):
        """What tells count, is_inception and widths."""
        return self.source if self.summary is None else self.summary

    def pipeline(self, extractor):
        """What made its features; images have those of the extractor."""
        through_it = self.summary is None and self.source.needs_network
        return extractor.pipeline if through_it else self.known.pipeline

    def missing(self, features, score):
        """-> its source, if that is needed for features, a score or all; or None."""
        if self.summary is None:
            return self.source
        lacks = (features and self.summary.features is None) or (
            score and self.summary.score is None
        )
        return self.source if lacks else None

    def describe(self):
        used = "; ".join(f"{what} from {key}" for what, key in self.keys.items())
        return f"{self.path}: {used}"


def of_images(images, width=POOL):
    """A set as in image_sets.py -> Side; width: see open_side."""
    return Side(images.path, None, OfImages(images, width), {"all": "its images"})


def open_side(path, only_features=False, width=POOL):
    """-> Side: a folder, images, features, ADM's statistics or ours.

    width: numbers in the features that a network will make of images.
    """
    path = as_path(path)
    if is_remote(path) and path.is_dir():
        local_path(path)  # refuses it, with what to do: pictures are read from a disk
    if path.is_dir() and not only_features:
        return Side(
            path, None, OfImages(FolderImages(path), width), {"all": "its images"}
        )
    if not path.exists():
        raise UserError(
            f"nothing at {path}; name images, features or statistics, which "
            "evaluate.py --stats IMAGES --out FILE makes"
        )
    file = ArrayFile(path)
    if "mu" in file and not only_features:
        return _statistics(file)
    if only_features or "pool" in file or "features" in file:
        stored = StoredFeatures(file)
        return Side(path, None, OfFeatures(stored), {"all": ", ".join(stored.names)})
    return Side(path, None, OfImages(NpzImages(file), width), {"all": "arr_0"})


def _statistics(file):
    found, source = summary.load(file.path), None
    keys = {"FID": "mu, sigma"}
    if found.spatial is not None:
        keys["sFID"] = "mu_s, sigma_s"
    if found.features is not None:
        keys["precision and recall"] = f"pool ({len(found.features)} features)"
    elif "arr_0" in file:
        source = OfImages(NpzImages(file))
        keys["precision and recall"] = f"arr_0 ({source.count} images)"
    return Side(file.path, found, source, keys)
