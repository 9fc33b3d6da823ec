"""What can be evaluated: an .npz of images, a folder, stored features, statistics.

An image set has a length, a shape [H, W, 3] and `batches(size)`, which yields uint8
[n, H, W, 3] in order, or only the batches of the given numbers. Never all images are in
memory. Its `identity` tells whether it is still the same set. Grey images count as
coloured ones, as in PIL.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sit_jax.data.images import to_rgb
from sit_jax.errors import UserError
from sit_jax.evaluation.features import Batch, FeatureExtractor, StoredFeatures
from sit_jax.evaluation.statistics import FeatureStatistics, load_statistics
from sit_jax.files import PathLike, as_path, is_remote, local_path
from sit_jax.models.inception import POOL
from sit_jax.sampling.outputs import ArrayFile

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
THREADS = 8


class ImageSet(Protocol):
    """Images uint8 [H, W, 3] in order, of which a batch is in memory."""

    path: Path
    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def batches(
        self, size: int, numbers: Iterable[int] | None = None
    ) -> Iterator[UInt8[np.ndarray, "n h w 3"]]: ...


class NpzImages:
    """arr_0 of an .npz as ADM's evaluator reads it: uint8 [N, H, W, 3]."""

    def __init__(self, file):
        self.path, self._member = file.path, _image_member(file)
        self.shape = (*self._member.shape[1:3], 3)

    def __len__(self) -> int:
        return len(self._member)

    @property
    def identity(self):
        return self._member.identity

    def batches(
        self, size: int, numbers: Iterable[int] | None = None
    ) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        for images in self._member.batches(size, numbers):
            yield np.broadcast_to(images, (*images.shape[:3], 3))


class FolderImages:
    """The images in a folder and below it, by name; all of one size."""

    def __init__(self, path):
        self.path = local_path(path)
        files = self.path.rglob("*")
        self._files = sorted(f for f in files if f.suffix.lower() in ENDINGS)
        if not self._files:
            raise UserError(f"{path} holds no images ({', '.join(ENDINGS)})")
        with ThreadPoolExecutor(THREADS) as pool:
            sizes = list(pool.map(_size, self._files))
        if others := [i for i, size in enumerate(sizes) if size != sizes[0]]:
            first, other = (
                f"{self._files[i].name} is {sizes[i][1]} x {sizes[i][0]}"
                for i in (0, others[0])
            )
            raise UserError(
                f"{path} mixes sizes: {first}, {other}; crop them to one size"
            )
        self.shape = (*sizes[0], 3)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def identity(self):
        """A digest of names, sizes and times of change."""
        digest = hashlib.sha256()
        for file in self._files:
            stat = file.stat()
            version = (str(file.relative_to(self.path)), stat.st_size, stat.st_mtime_ns)
            digest.update(repr(version).encode())
        return digest.hexdigest()

    def batches(
        self, size: int, numbers: Iterable[int] | None = None
    ) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        with ThreadPoolExecutor(THREADS) as pool:
            for start in batch_starts(len(self), size, numbers):
                yield np.stack(
                    list(pool.map(_pixels, self._files[start : start + size]))
                )


def batch_starts(
    count: int, size: int, numbers: Iterable[int] | None = None
) -> list[int]:
    """Returns where batches begin, of all or of those with the given numbers."""
    numbers = range(-(-count // size)) if numbers is None else numbers
    return [number * size for number in numbers]


class ImageFeatures:
    """Features that a network has to make of images.

    Args:
      images: an image set.
      width: numbers in the network's features.
    """

    needs_network, pipeline = True, None

    def __init__(self, images: ImageSet, width: int = POOL):
        self.images, self.path, self.count = images, images.path, len(images)
        self.width, self.is_inception = width, width == POOL

    def widths(self, extractor: FeatureExtractor) -> dict[str, int]:
        """Returns how many numbers the features have, by name."""
        return extractor.widths(self.images.shape)

    def features(
        self, extractor: FeatureExtractor, numbers: Iterable[int] | None = None
    ) -> Iterator[Batch]:
        """Yields batches of features: all, or those with the given numbers."""
        return extractor(self.images.batches(extractor.batch_size, numbers))


@dataclasses.dataclass(frozen=True)
class EvaluationInput:
    """Samples or a reference: statistics, what features come from, or both.

    Attributes:
      path: the file or folder.
      statistics: those that the file holds.
      source: what features come from.
      keys: what is taken from which arrays of the file.
    """

    path: Path
    statistics: FeatureStatistics | None
    source: ImageFeatures | StoredFeatures | None
    keys: dict[str, str]

    @property
    def contents(self) -> FeatureStatistics | ImageFeatures | StoredFeatures:
        """The statistics or the source, which have count, is_inception and widths."""
        return self.source if self.statistics is None else self.statistics

    def pipeline(self, extractor: FeatureExtractor):
        """Returns what made its features; those of images, the extractor makes."""
        is_extracted = self.statistics is None and self.source.needs_network
        return extractor.pipeline if is_extracted else self.contents.pipeline

    def missing(self, features: bool, score: bool):
        """Returns its source if that is needed for features or a score, else None."""
        if self.statistics is None:
            return self.source
        lacks = (features and self.statistics.features is None) or (
            score and self.statistics.score is None
        )
        return self.source if lacks else None

    def describe(self) -> str:
        """Returns a line that says what is taken from where."""
        used = "; ".join(f"{what} from {key}" for what, key in self.keys.items())
        return f"{self.path}: {used}"


def input_of_images(images: ImageSet, width: int = POOL) -> EvaluationInput:
    """Returns the input of an image set; width: see open_input."""
    return EvaluationInput(
        images.path, None, ImageFeatures(images, width), {"all": "its images"}
    )


def open_input(
    path: PathLike, only_features: bool = False, width: int = POOL
) -> EvaluationInput:
    """Opens a folder, images, features, ADM's statistics or ours.

    Args:
      path: the file or folder.
      only_features: whether only features are taken, as of --features.
      width: numbers in the features that a network will make of images.
    """
    path = as_path(path)
    if is_remote(path) and path.is_dir():
        local_path(path)  # refuses it, with what to do: pictures are read from a disk
    if path.is_dir() and not only_features:
        return input_of_images(FolderImages(path), width)
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
        return EvaluationInput(path, None, stored, {"all": ", ".join(stored.names)})
    return EvaluationInput(
        path, None, ImageFeatures(NpzImages(file), width), {"all": "arr_0"}
    )


def _statistics(file):
    statistics, source = load_statistics(file.path), None
    keys = {"FID": "mu, sigma"}
    if statistics.spatial is not None:
        keys["sFID"] = "mu_s, sigma_s"
    if statistics.features is not None:
        keys["precision and recall"] = f"pool ({len(statistics.features)} features)"
    elif "arr_0" in file:
        source = ImageFeatures(NpzImages(file))
        keys["precision and recall"] = f"arr_0 ({source.count} images)"
    return EvaluationInput(file.path, statistics, source, keys)


def _image_member(file):
    """Returns arr_0, if it is what ADM's evaluator takes."""
    if "arr_0" not in file:
        listed = ", ".join(file.names) or "nothing"
        raise UserError(
            f"{file.path} has no arr_0, only {listed}; save images as "
            "np.savez(path, uint8 [N, H, W, 3])"
        )
    member = file.member("arr_0")
    shape, summary = member.shape, f"{file.path}: arr_0 is {member.dtype}"
    if member.dtype != np.uint8:
        raise UserError(f"{summary} {list(shape)}; images are uint8, 0 to 255")
    if len(shape) == 4 and shape[3] in (1, 3) and min(shape) > 0:
        return member
    if len(shape) == 4 and shape[1] in (1, 3):
        raise UserError(f"{summary} {list(shape)}, channels first; transpose to NHWC")
    raise UserError(f"{summary} {list(shape)}; images are [N, H, W, 3]")


def _size(file):
    """Returns (height, width), from the file's beginning."""
    try:
        with Image.open(file) as image:
            return image.height, image.width
    except Exception as error:  # decoders raise anything
        raise UserError(f"{file} cannot be read as an image") from error


def _pixels(file):
    try:
        return np.asarray(to_rgb(file.read_bytes()))
    except UserError as error:
        raise UserError(f"{file} cannot be read as an image ({error})") from error
