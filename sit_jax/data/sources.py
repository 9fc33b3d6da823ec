"""Data sources: sequences of records, each a dict of numpy arrays.

A record holds "label", an int32 in [0, classes), and one of
"image" uint8 [h, w, c],
"moments" float32 [h, w, 2c], the mean and log variance of a VAE's posterior,
"latent" float32 [h, w, c], drawn from the posterior and scaled already.
Sources can be pickled and do not import JAX, as worker processes read them.
"""

import dataclasses
import hashlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from sit_jax.errors import UserError
from sit_jax.files import local_path
from sit_jax.ranges import COUNT, AtLeast, Between

RECORD_DTYPES = {"image": np.uint8, "moments": np.float32, "latent": np.float32}
NPY_HEADER = re.compile(
    rb"'descr': *'([<>|=][fiu][1248])', *'fortran_order': *(True|False), *"
    rb"'shape': *\(([\d, ]*)\)"
)

Record = dict[str, Any]


class DataSource(ABC):
    """A sequence of records; a subclass gives __len__, __getitem__, shape, classes.

    Attributes:
      shape: of a record's image, moments or latent.
      classes: number of classes.
      class_names: in their order, where known.
      flip: whether batches take flipped(i) for half of the positions.
      max_corrupt_fraction: more CorruptImages than that end a run.
      metadata: CacheMetadata, where the records are latents from a cache.
      remarks: sentences on what the data's owner may not have meant.
    """

    shape: tuple[int, ...]
    classes: int
    class_names: Sequence[str] | None = None
    flip: bool = False
    max_corrupt_fraction: float = 0.0
    metadata: Any = None
    remarks: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of records."""

    @abstractmethod
    def __getitem__(self, i: int) -> Record:
        """Returns record i; raises IndexError beyond the last one."""

    def flipped(self, i: int) -> Record:
        """Returns record i, its image mirrored left to right."""
        record = self[i]
        return record | {"image": record["image"][:, ::-1]}

    def name(self, i: int) -> str:
        """Returns what messages call record i."""
        return f"record {i}"


@dataclasses.dataclass(frozen=True)
class Synthetic(DataSource):
    """Normal noise as latents, to try things out. Record i follows from (seed, i)."""

    shape: tuple = (32, 32, 4)
    classes: Annotated[int, COUNT] = 1000
    length: Annotated[int, COUNT] = 4096
    seed: int = 0

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        if not 0 <= i < self.length:
            raise IndexError(i)
        rng = np.random.default_rng((self.seed, i))
        latent = rng.standard_normal(self.shape, np.float32)
        return {"latent": latent, "label": np.int32(rng.integers(self.classes))}


class Arrays(DataSource):
    """Images in memory; read_record() checks their values.

    Args:
      images: the pixels of all images.
      labels: the class of each image.
      classes: number of classes; by default one more than the largest label.
      flip: whether batches mirror half of the images.
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, "n h w c"],
        labels: Int[np.ndarray, " n"],
        classes: int | None = None,
        flip: bool = False,
    ):
        self.images, self.labels = np.asarray(images), np.asarray(labels, np.int32)
        if self.images.ndim != 4 or self.labels.shape != self.images.shape[:1]:
            raise UserError(
                f"images are {list(self.images.shape)}, labels "
                f"{list(self.labels.shape)}; give [N, H, W, C] and [N]"
            )
        self.classes = int(self.labels.max()) + 1 if classes is None else classes
        self.shape, self.flip = self.images.shape[1:], flip
        self.class_names = [str(label) for label in range(self.classes)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": self.labels[i]}

    def listing_sha256(self) -> str:
        """Returns the sha256 of the images and their labels."""
        digest = hashlib.sha256(np.ascontiguousarray(self.images).data)
        digest.update(self.labels.astype("<i4").tobytes())
        return digest.hexdigest()


class Digits(Arrays):
    """The 1,797 handwritten digits of scikit-learn, images [8, 8, 1].

    The split into training and held-out records is the same for everybody; each class
    gives its share of the held-out ones.
    """

    def __init__(
        self,
        train: bool = True,
        held_out: Annotated[int, Between(1, 1796)] = 500,
        seed: int = 0,
    ):
        from sklearn.datasets import load_digits

        scans = load_digits()
        ids = _stratified_split(scans.target, held_out, seed)[0 if train else 1]
        grey = np.round(scans.images[ids] * (255 / 16))  # 16 is full ink
        super().__init__(grey.astype(np.uint8)[..., None], scans.target[ids], 10)
        self.class_names = None  # they are the numbers


class LatentFolder(DataSource):
    """fast-DiT's folder of latents, one file an image.

    path/imagenet256_features/{i}.npy is float32 [1, c, h, w], one draw of the VAE's
    posterior with the scale 0.18215 and a random flip already in it;
    path/imagenet256_labels/{i}.npy is an integer [1]. The names say 256 at any size.

    Source: github.com/chuanyangjin/fast-DiT, extract_features.py.
    """

    def __init__(self, path: str, classes: int = 1000):
        folder = local_path(path)
        self.features = folder / "imagenet256_features"
        self.targets = folder / "imagenet256_labels"
        self.classes = classes
        self.names, targets = _npy_names(self.features), _npy_names(self.targets)
        if unpaired := sorted(set(self.names) ^ set(targets)):
            raise UserError(
                f"{folder} has {len(self.names)} latents and {len(targets)} labels; "
                f"{unpaired[0]} is in one folder only; extract it again or remove it"
            )
        self.shape = self[0]["latent"].shape

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        latent = _read_npy(self.features / self.names[i])
        label = _read_npy(self.targets / self.names[i])
        if latent.ndim == 4 and len(latent) == 1:
            latent = latent[0]
        is_label = label.dtype.kind in "iu" and label.size == 1
        if latent.dtype.kind != "f" or latent.ndim != 3 or not is_label:
            raise UserError(
                f"{self.name(i)} and its label are {latent.dtype} {latent.shape} and "
                f"{label.dtype} {label.shape}, not floats [1, C, H, W] and an integer "
                "[1]; extract them again"
            )
        latent = np.ascontiguousarray(np.moveaxis(latent, 0, -1), np.float32)
        return {"latent": latent, "label": np.int32(label.item())}

    def name(self, i):
        return str(self.features / self.names[i])


class WrappedSource(DataSource):
    """Another source's records, to be changed by a subclass."""

    def __init__(self, source: DataSource):
        self.source, self.shape, self.classes = source, source.shape, source.classes
        self.class_names, self.flip = source.class_names, source.flip
        self.max_corrupt_fraction = source.max_corrupt_fraction
        self.metadata, self.remarks = source.metadata, source.remarks

    def __len__(self):
        return len(self.source)

    def name(self, i):
        return self.source.name(i)


class LabelOffset(WrappedSource):
    """Another source's records, where class c becomes class `after` + c.

    For new classes by LoRA: a base network of 1,000 classes and a folder of 3 give
    1,003, of which the data shows the last 3.
    """

    def __init__(self, source: DataSource, after: Annotated[int, AtLeast(0)] = 1000):
        super().__init__(source)
        self.after, self.classes = after, after + source.classes

    def __getitem__(self, i):
        return self._with_offset(self.source[i])

    def flipped(self, i):
        return self._with_offset(self.source.flipped(i))

    def _with_offset(self, record):
        return record | {"label": np.int32(record["label"] + self.after)}


def invert(image: UInt8[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w c"]:
    """Returns the negative of an image."""
    return 255 - image


class ImageTransform(WrappedSource):
    """Another source's images, each as `transform` makes it; they are not flipped.

    Args:
      source: a source of images.
      transform: uint8 [h, w, c] -> uint8 [h, w, c].
    """

    def __init__(self, source: DataSource, transform: Callable = invert):
        super().__init__(source)
        self.transform, self.flip = transform, False

    def __getitem__(self, i):
        record = self.source[i]
        return record | {"image": self.transform(record["image"])}


def _stratified_split(labels, held_out, seed):
    """Returns ids to train on and ids held out; each class gives its share of both."""
    order = np.random.default_rng(seed).permutation(len(labels))
    rank = np.empty(len(labels))  # of a record within its class, from 0 to 1
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    ranked = order[np.argsort(rank[order], kind="stable")]
    return np.sort(ranked[held_out:]), np.sort(ranked[:held_out])


def _npy_names(folder):
    """Returns the names of the .npy files, 2 before 10, as they were numbered."""
    names = [path.name for path in folder.glob("*.npy")]
    if not names:
        raise UserError(
            f"no folder of .npy files at {folder}; --config.source.path=DIR names "
            "another, configs/sit_xl2_cached.py is for what extract_features.py "
            "writes, --config.synthetic=True for random latents"
        )
    return sorted(names, key=lambda name: (len(name), name))


def _read_npy(path) -> Float[np.ndarray, "..."] | Int[np.ndarray, "..."]:
    """Reads a .npy file of numbers (NEP 1); objects and code are refused.

    Not by numpy: it evaluates the header with ast, which in threads of Python 3.11
    ends in a SystemError now and then (cpython#106905).
    """
    try:
        data = path.read_bytes()
        start = 10 if data[6:7] == b"\1" else 12  # of the header, after its length
        end = start + int.from_bytes(data[8:start], "little")
        match = NPY_HEADER.search(data[start:end])
        if data[:6] != b"\x93NUMPY" or match is None:
            raise ValueError("no .npy file of numbers")
        dtype, fortran, sizes = (group.decode() for group in match.groups())
        shape = [int(size) for size in sizes.replace(",", " ").split()]
        array = np.frombuffer(data, dtype, math.prod(shape), end)
        return array.reshape(shape, order="F" if fortran == "True" else "C")
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"cannot read {path} ({reason}); extract this file again"
        ) from error
