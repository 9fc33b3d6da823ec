"""Images in tars, read in place, and data sets that TFDS has prepared."""

import contextlib
import dataclasses
import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from sit_jax.data.folders import is_image, require_folder
from sit_jax.data.images import CorruptImage, Images
from sit_jax.errors import UserError
from sit_jax.files import local_path, parse_json
from sit_jax.ranges import COUNT

IMAGENET = (
    "ILSVRC2012_img_train.tar (147,897,477,120 bytes, from image-net.org with an "
    "account there)"
)
# what tarfile raises: of numbers too large, and of headers in headers in headers
TAR_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError)
OTHER_SOURCES = "or read the original files with ImageNetTar or ImageFolder"


class Member(NamedTuple):
    """A file inside a tar."""

    tar: Path
    name: str
    offset: int  # of its first byte in the whole tar
    size: int  # bytes

    def read(self) -> bytes:
        """Returns its bytes."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            data = file.read(self.size)
        if len(data) != self.size:
            raise CorruptImage(f"the tar ends {self.size - len(data)} bytes early")
        return data


class TarImages(Images):
    """Images that are members of tars; their bytes are read where they lie."""

    def set_members(
        self, members: Sequence[Member], labels: Sequence[int], classes: Sequence[str]
    ) -> None:
        """Sets the images, the class of each, and the names of the classes."""
        self.set_images([m.name for m in members], labels, classes)
        self.tars = list(dict.fromkeys(member.tar for member in members))
        numbers = {tar: number for number, tar in enumerate(self.tars)}
        places = [(numbers[m.tar], m.offset, m.size) for m in members]
        self.places = np.array(places, np.int64)  # [n, 3]: compact, for a million

    def member(self, i: int) -> Member:
        """Returns where image i lies."""
        tar, offset, size = self.places[i].tolist()
        return Member(self.tars[tar], os.fsdecode(self.names[i]), offset, size)

    def read(self, i):
        return self.member(i).read(), self.labels[i]

    def name(self, i):
        member = self.member(i)
        return f"{member.tar}:{member.name}"


@dataclasses.dataclass(eq=False)
class ImageNetTar(TarImages):
    """The training tar of ILSVRC 2012: in it one tar a class, in that the images.

    Classes and images in the order that an ImageFolder of the unpacked tar has. The
    headers of all images are read at the start, about a minute for the 1,281,167.
    """

    path: str

    def __post_init__(self):
        path = local_path(self.path)
        if not path.is_file():
            raise UserError(f"no file {path}; put {IMAGENET} there")
        images = dict(sorted(read_inner_tars(path)))
        if not images:
            raise UserError(f"{path} is empty; give {IMAGENET}")
        members, labels = [], []
        for label, name in enumerate(images):
            if not images[name]:
                raise UserError(f"{path}: no images in {name}.tar; get it again")
            members += sorted(images[name])
            labels += [label] * len(images[name])
        self.set_members(members, labels, list(images))


@dataclasses.dataclass(eq=False)
class WebdatasetTars(TarImages):
    """A folder of tars in webdataset's layout: key.jpg with key.cls or key.json.

    key.cls is a number; key.json is a dict with a number at `field`.
    """

    path: str
    classes: Annotated[int, COUNT] = 1000
    field: str = "label"

    def __post_init__(self):
        root = require_folder(self.path)
        tars = sorted(root.glob("*.tar"))
        if not tars:
            raise UserError(f"no .tar files in {root}; --kind names other layouts")
        samples = [s for tar in tars for s in self._read_samples(tar)]
        members, labels = zip(*samples, strict=True)
        self.set_members(members, labels, [str(c) for c in range(self.classes)])

    def _read_samples(self, tar):
        """Returns (Member of the image, label) for each key of a tar, in its order."""
        images, labels = {}, {}
        for member in read_members(tar):
            folder, _, base = member.name.rpartition("/")
            key, _, ending = base.partition(".")
            key = f"{folder}/{key}".lstrip("/")
            if is_image(member.name):
                if key in images:
                    raise UserError(f"{tar} has two images for the key {key}")
                images[key] = member
            elif ending in ("cls", "json"):
                labels[key] = self._read_label(member, ending)
        if not images:
            raise UserError(f"no images in {tar}; remove it or get it again")
        for key in images.keys() ^ labels.keys():
            missing = "label (.cls or .json)" if key in images else "image"
            raise UserError(f"{tar}: {key} has no {missing}")
        return [(image, labels[key]) for key, image in images.items()]

    def _read_label(self, member, ending):
        try:
            data = member.read()
            label = int(data) if ending == "cls" else parse_json(data)[self.field]
            if type(label) is int and 0 <= label < self.classes:
                return label
        except (ValueError, KeyError, TypeError):
            pass  # refused below, too
        place = "" if ending == "cls" else f" at {self.field!r}"
        raise UserError(
            f"{member.tar}:{member.name} holds no number from 0 to {self.classes - 1}"
            f"{place}; set classes or field, or write the label again"
        )


@dataclasses.dataclass(eq=False)
class Tfds(Images):
    """Images of tfds.data_source(dataset, split), read without TensorFlow.

    The data set must have been prepared as array_record, the only format with random
    access. Preparing many sets, imagenet2012 among them, needs TensorFlow, once.
    data_dir: tfds's own by default.
    """

    # tfds imports the module that `dataset` names: a stored config may not have it
    named_by_user_only = True

    dataset: str
    split: str = "train"
    data_dir: str = None

    def __post_init__(self):
        self.records = _open_tfds(self.dataset, self.split, self.data_dir)
        info = self.records.dataset_info
        self.full_name = info.full_name
        self.set_images((), (), info.features["label"].names)

    def __len__(self):
        return len(self.records)

    def read(self, i):
        record = self.records[i]
        return record["image"], record["label"]

    def name(self, i):
        return f"{self.full_name}/{self.split}[{i}]"

    def listing_sha256(self):
        """Returns the sha256 of the set's name with version, split and length."""
        words = (self.full_name, self.split, str(len(self)))
        return hashlib.sha256("\0".join(words).encode()).hexdigest()


def read_members(path: Path) -> list[Member]:
    """Returns the files of a tar that is not compressed.

    Raises:
      UserError: it is damaged, compressed or cut short, or holds links or devices.
    """
    with _open_tar(path) as tar:
        return [Member(path, m.name, m.offset_data, m.size) for m in _files(tar)]


def read_inner_tars(path: Path) -> Iterator[tuple[str, list[Member]]]:
    """Yields the name of each tar in a tar, without ending, and the images in it."""
    with _open_tar(path) as tar:
        for entry in _files(tar):
            if not entry.name.endswith(".tar"):
                raise UserError(
                    f"{path} holds {entry.name} instead of one tar a class; "
                    f"give {IMAGENET}"
                )
            name, images = Path(entry.name).stem, []
            inner = tarfile.open(fileobj=tar.extractfile(entry), mode="r:")
            for m in _files(inner):
                if is_image(m.name):
                    offset = entry.offset_data + m.offset_data
                    images.append(Member(path, f"{name}/{m.name}", offset, m.size))
            yield name, images


@contextlib.contextmanager
def _open_tar(path):
    """Opens a tar; whatever is wrong with it inside the block is a UserError."""
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except UserError:  # is a ValueError too
        raise
    except TAR_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} is no tar, or compressed, damaged or cut short ({reason}); "
            "unpack it, or get it again"
        ) from error


def _files(tar) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files of an open tar; refuses what tarfile would pass over."""
    for member in tar:
        if member.size < 0:  # tarfile would go back, and round in circles
            raise tarfile.ReadError(f"{member.name!r} has {member.size} bytes")
        if member.isreg() and member.sparse is None:
            yield member
        elif not member.isdir():
            raise tarfile.ReadError(f"{member.name!r} is a link or a device, no file")
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):  # tarfile takes it for the end
        raise tarfile.ReadError(f"no header at byte {tar.offset}")


def _open_tfds(name, split, data_dir):
    try:
        import tensorflow_datasets as tfds

        decoders = {"image": tfds.decode.SkipDecoding()}  # the file's bytes
        return tfds.data_source(
            name, split=split, data_dir=data_dir, download=False, decoders=decoders
        )
    except ImportError as error:
        missing = (error.name or "tensorflow_datasets").split(".")[0].replace("_", "-")
        raise UserError(
            f"tfds needs {missing}: pip install {missing}; {OTHER_SOURCES}"
        ) from error
    except (AssertionError, NotImplementedError, OSError, ValueError) as error:
        # not prepared, prepared in another format, not there, or no such split
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"tfds cannot read {name!r}, split {split!r}, in {data_dir or 'its folder'}"
            f" ({reason}); preparing it as array_record needs TensorFlow, once, on any "
            f"machine (tfds build --file_format=array_record); {OTHER_SOURCES}"
        ) from error
