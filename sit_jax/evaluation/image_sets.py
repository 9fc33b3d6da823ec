"""What can be evaluated: an .npz of images, a folder, stored features, statistics."""

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
from sit_jax.evaluation.features import (
    ExtractedFeatures,
    FeatureExtractor,
    StoredFeatures,
)
from sit_jax.evaluation.statistics import FeatureStatistics, load_statistics
from sit_jax.files import PathLike, as_path, local_path
from sit_jax.sampling.outputs import ArrayFile

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
THREADS = 8

Images = Iterator[UInt8[np.ndarray, "n h w 3"]]
Numbers = Iterable[int] | None  # of batches, None for all


class ImageSet(Protocol):
    """Images uint8 [H, W, 3] in order, of which a batch is in memory.

    Its batches are all, or those with the given numbers. Grey images count as coloured
    ones, as in PIL.
    """

    path: Path
    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def batches(self, size: int, numbers: Numbers = None) -> Images: ...


class NpzImages:
    """arr_0 of an .npz as ADM's evaluator reads it: uint8 [N, H, W, 3]."""

    def __init__(self, file):
        self.path, self._member = file.path, _image_member(file)
        self.shape = (*self._member.shape[1:3], 3)

    def __len__(self) -> int:
        return len(self._member)

    @property
    def identity(self) -> list:
        """Tells whether it is still the same set."""
        return self._member.identity

    def batches(self, size: int, numbers: Numbers = None) -> Images:
        """Yields the images in order."""
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
        height, width = sizes[0]
        for file, size in zip(self._files, sizes, strict=True):
            if size != sizes[0]:
                raise UserError(
                    f"{path} mixes sizes: {self._files[0].name} is {width} x {height}, "
                    f"{file.name} is {size[1]} x {size[0]}; crop them to one size"
                )
        self.shape = (*sizes[0], 3)

    def __len__(self) -> int:
        return len(self._files)

    @property
    def identity(self) -> str:
        """A digest of names, sizes and times of change."""
        digest = hashlib.sha256()
        for file in self._files:
            stat = file.stat()
            version = (str(file.relative_to(self.path)), stat.st_size, stat.st_mtime_ns)
            digest.update(repr(version).encode())
        return digest.hexdigest()

    def batches(self, size: int, numbers: Numbers = None) -> Images:
        """Yields the images in order."""
        with ThreadPoolExecutor(THREADS) as pool:
            for start in batch_starts(len(self), size, numbers):
                files = self._files[start : start + size]
                yield np.stack(list(pool.map(_pixels, files)))


def batch_starts(count: int, size: int, numbers: Numbers = None) -> list[int]:
    """Returns where batches begin, of all or of those with the given numbers."""
    numbers = range(-(-count // size)) if numbers is None else numbers
    return [number * size for number in numbers]


FeatureSource = ExtractedFeatures | StoredFeatures
Contents = FeatureStatistics | FeatureSource


@dataclasses.dataclass(frozen=True)
class EvaluationInput:
    """Samples or a reference: statistics, images, or stored features.

    Attributes:
      path: the file or folder.
      keys: what is taken from which arrays of the file.
      statistics: those that the file holds.
      images: alone, or for what the statistics beside them lack.
      stored: features that the file holds.
    """

    path: Path
    keys: dict[str, str]
    statistics: FeatureStatistics | None = None
    images: ImageSet | None = None
    stored: StoredFeatures | None = None

    def source(self, extractor: FeatureExtractor | None) -> FeatureSource:
        """Returns what features come from."""
        if self.images is None:
            return self.stored
        return ExtractedFeatures(self.images, extractor)

    def contents(self, extractor: FeatureExtractor | None) -> Contents:
        """Returns the statistics or else the source: both say what made them."""
        return self.source(extractor) if self.statistics is None else self.statistics

    def without_images(self, features: bool, score: bool) -> "EvaluationInput":
        """Returns it without images if its statistics have what is needed.

        Args:
          features: whether features are needed.
          score: whether the Inception Score is.
        """
        statistics = self.statistics
        lacks_features = statistics is None or (
            features and statistics.features is None
        )
        if lacks_features or (score and statistics.score is None):
            return self
        return dataclasses.replace(self, images=None)

    def describe(self) -> str:
        """Returns a line that says what is taken from where."""
        used = "; ".join(f"{what} from {key}" for what, key in self.keys.items())
        return f"{self.path}: {used}"


def input_of_images(images: ImageSet) -> EvaluationInput:
    """Returns the input of an image set."""
    return EvaluationInput(images.path, {"all": "its images"}, images=images)


def open_input(path: PathLike, only_features: bool = False) -> EvaluationInput:
    """Opens a folder, images, features, ADM's statistics or ours.

    Args:
      path: the file or folder.
      only_features: whether only features are taken, as of --features.
    """
    path = as_path(path)
    if path.is_dir() and not only_features:
        return input_of_images(FolderImages(path))
    if not path.exists():
        raise UserError(
            f"nothing at {path}; name images, features or statistics, which "
            "evaluate.py --stats IMAGES --out FILE makes"
        )
    file = ArrayFile(path)
    if "mu" in file and not only_features:
        return _open_statistics(file)
    if only_features or "pool" in file or "features" in file:
        stored = StoredFeatures(file)
        return EvaluationInput(path, {"all": ", ".join(stored.names)}, stored=stored)
    return EvaluationInput(path, {"all": "arr_0"}, images=NpzImages(file))


def _open_statistics(file):
    statistics, images = load_statistics(file.path), None
    keys = {"FID": "mu, sigma"}
    if statistics.spatial is not None:
        keys["sFID"] = "mu_s, sigma_s"
    if statistics.features is not None:
        keys["precision and recall"] = f"pool ({len(statistics.features)} features)"
    elif "arr_0" in file:
        images = NpzImages(file)
        keys["precision and recall"] = f"arr_0 ({len(images)} images)"
    return EvaluationInput(file.path, keys, statistics, images)


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
