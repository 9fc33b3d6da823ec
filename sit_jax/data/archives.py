"""Images in tars, read in place, and data sets that tensorflow-datasets has prepared.

Nothing is unpacked. An archive from elsewhere is not to be trusted: names that climb,
links, and sizes beyond the file or beyond reason are refused.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

from sit_jax.data.folders import is_image, require_folder
from sit_jax.data.images import CorruptImage, Fraction, Images, Size, pack_names
from sit_jax.errors import UserError
from sit_jax.files import local_path, parse_json
from sit_jax.ranges import COUNT

LARGEST = 2**27  # bytes of an image inside a tar
IMAGENET = (
    "ILSVRC2012_img_train.tar (147,897,477,120 bytes, from image-net.org with an "
    "account there)"
)
OTHER_SOURCES = "or read the original files with ImageNetTar or ImageFolder"


class Member(NamedTuple):
    """A regular file inside a tar."""

    name: str
    offset: int  # of its first byte in the whole file
    size: int  # bytes


class TarFiles:
    """The bytes of files inside tars.

    Args:
      paths: the tars.
      tars: for each member, the number of the tar that it is in.
      members: where the files lie.
    """

    def __init__(self, paths: list[Path], tars: list[int], members: list[Member]):
        self._paths = [str(path) for path in paths]
        self._tars = np.array(tars, np.int32)
        self._offsets = np.array([m.offset for m in members], np.int64)
        self._sizes = np.array([m.size for m in members], np.int64)
        self.names = pack_names(m.name for m in members)

    def __getitem__(self, i):
        size = int(self._sizes[i])
        try:
            with open(self._paths[self._tars[i]], "rb") as file:
                file.seek(int(self._offsets[i]))
                data = file.read(size)
        except OSError as error:
            raise CorruptImage(error.strerror or str(error)) from error
        if len(data) != size:
            raise CorruptImage(f"the tar ends {size - len(data)} bytes early")
        return data

    def name(self, i):
        """Returns TAR:NAME of member i."""
        return f"{self._paths[self._tars[i]]}:{os.fsdecode(self.names[i])}"


class ImageNetTar(Images):
    """The training tar of ILSVRC 2012: in it one tar a class, in that the images.

    Classes and images in the order that an ImageFolder of the unpacked tar has. The
    headers of all images are read at the start, about a minute for the 1,281,167.
    """

    def __init__(
        self,
        path: str,
        size: Size = 256,
        flip: bool = True,
        max_corrupt_fraction: Fraction = 0.001,
    ):
        path = local_path(path)
        if not path.is_file():
            raise UserError(f"no file {path}; put {IMAGENET} there")
        tars = sorted(read_members(path, largest=2**40))
        other = next((t.name for t in tars if not t.name.endswith(".tar")), "nothing")
        if not tars or other != "nothing":
            raise UserError(
                f"{path} holds {other} instead of one tar a class; give {IMAGENET}"
            )
        classes = [Path(tar.name).stem for tar in tars]
        members, labels = [], []
        for label, tar in enumerate(tars):
            images = [m for m in read_members(path, tar) if is_image(m.name)]
            if not images:
                raise UserError(f"{path}: no images in {tar.name}; get it again")
            for image in sorted(images):
                members.append(image._replace(name=f"{classes[label]}/{image.name}"))
                labels.append(label)
        files = TarFiles([path], [0] * len(members), members)
        super().__init__(files, labels, classes, size, flip, max_corrupt_fraction)


class WebdatasetTars(Images):
    """A folder of tars in webdataset's layout: key.jpg with key.cls or key.json.

    key.cls is a number; key.json is a dict with a number at `field`.
    """

    def __init__(
        self,
        path: str,
        size: Size = 256,
        classes: Annotated[int, COUNT] = 1000,
        field: str = "label",
        flip: bool = True,
        max_corrupt_fraction: Fraction = 0.001,
    ):
        root = require_folder(path)
        paths = sorted(root.glob("*.tar"))
        if not paths:
            raise UserError(f"no .tar files in {root}; --kind names other layouts")
        members, labels, tars = [], [], []
        for number, tar in enumerate(paths):
            for image, label in _read_samples(tar, field):
                if not 0 <= label < classes:
                    raise UserError(
                        f"{tar}:{image.name} has label {label}, but there are "
                        f"{classes} classes (0..{classes - 1}); set classes"
                    )
                members.append(image)
                labels.append(label)
                tars.append(number)
        files = TarFiles(paths, tars, members)
        names = [str(label) for label in range(classes)]
        super().__init__(files, labels, names, size, flip, max_corrupt_fraction)


class Tfds(Images):
    """Images of tfds.data_source(dataset, split), read without TensorFlow.

    The data set must have been prepared as array_record, the only format with random
    access. Preparing many sets, imagenet2012 among them, needs TensorFlow, once.
    data_dir: tfds's own by default. As tfds imports the module that `dataset` names, a
    stored config may not have this source (config.ROLES).
    """

    def __init__(
        self,
        dataset: str,
        split: str = "train",
        size: Size = 256,
        data_dir: str = None,
        flip: bool = True,
        max_corrupt_fraction: Fraction = 0.001,
    ):
        self._arguments, self._opened = (dataset, split, data_dir), None
        source = self._open()
        info = source.dataset_info
        self.full_name, self._length = info.full_name, len(source)
        names = info.features["label"].names
        super().__init__(None, (), names, size, flip, max_corrupt_fraction)

    def __len__(self):
        return self._length

    def read(self, i):
        if not 0 <= i < self._length:
            raise IndexError(i)
        record = self._open()[i]
        return record["image"], np.int32(record["label"])

    def name(self, i):
        return f"{self.full_name}/{self._arguments[1]}[{i}]"

    def listing_sha256(self):
        """Returns the sha256 of the set's name with version, split and length."""
        words = (self.full_name, self._arguments[1], str(self._length))
        return hashlib.sha256("\0".join(words).encode()).hexdigest()

    def _open(self):
        if self._opened is None:
            self._opened = _open_tfds(*self._arguments)
        return self._opened

    def __getstate__(self):  # a copy in another process opens its own files
        return self.__dict__ | {"_opened": None}


def read_members(
    path: Path, within: Member | None = None, largest: int = LARGEST
) -> Iterator[Member]:
    """Yields the regular files of a tar, or of a tar that is a member of it.

    Args:
      path: a tar that is not compressed.
      within: the member of it to look into.
      largest: bytes that a file may have.

    Raises:
      UserError: for what is damaged, compressed or cut short, and for names that lead
        out of the tar, links, devices and sparse files.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            start, end = 0, os.fstat(file.fileno()).st_size
            if within is not None:
                start, end = within.offset, within.offset + within.size
            file.seek(start)
            if end - start > 0:
                with tarfile.open(fileobj=_Part(file, start, end), mode="r:") as tar:
                    yield from _checked_members(tar, path, start, end, largest)
    except UserError:  # is a ValueError too
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise UserError(
            f"{path} is no tar, or compressed, damaged or cut short ({reason[0]}); "
            "unpack it, or get it again"
        ) from error


class _Part:
    """The bytes from start to end of an open file, as a file to read."""

    def __init__(self, file, start, end):
        self._file, self._start, self._end, self._at = file, start, end, 0

    def tell(self):
        return self._at

    def seek(self, at):
        self._at = at

    def read(self, size):
        self._file.seek(self._start + self._at)
        data = self._file.read(max(min(size, self._end - self._start - self._at), 0))
        self._at += len(data)
        return data


def _checked_members(tar, path, start, end, largest):
    for member in iter(tar.next, None):
        name, size = member.name, member.size
        where = f"{path}: {name[:200]!r} at byte {start + member.offset}"
        offset = start + member.offset_data
        if name.startswith("/") or ".." in name.split("/") or "\\" in name:
            raise UserError(f"{where} leads out of the tar; make another tar")
        if not 0 <= size <= largest:
            raise UserError(f"{where} says it has {size} bytes, more than {largest}")
        if offset + size > end:
            raise UserError(
                f"{where} has {size} bytes, but only {end - offset} are there; "
                "the tar is cut short, get it again"
            )
        if member.isreg() and member.sparse is None:
            yield Member(name, offset, size)
        elif not member.isdir():
            raise UserError(f"{where} is a link or a device, no file; make another tar")
        tar.members.clear()  # else it keeps all of them
    tar.fileobj.seek(tar.offset)
    if any(tar.fileobj.read(tarfile.BLOCKSIZE)):  # tarfile takes it for the end
        raise UserError(f"{path} is damaged at byte {start + tar.offset}; get it again")


def _read_samples(tar, field):
    """Returns (Member of the image, label) for each key of a tar, in its order."""
    images, labels = {}, {}
    for member in read_members(tar):
        folder, _, base = member.name.rpartition("/")
        key, _, ending = base.partition(".")
        key = f"{folder}/{key}"
        if is_image(member.name):
            if key in images:
                raise UserError(f"{tar} has two images for the key {key[1:]}")
            images[key] = member
        elif ending in ("cls", "json"):
            labels[key] = _read_label(tar, member, ending, field)
    if not images:
        raise UserError(f"no images in {tar}; remove it or get it again")
    for key in images.keys() ^ labels.keys():
        missing = "label (.cls or .json)" if key in images else "image"
        raise UserError(f"{tar}: {key.lstrip('/')} has no {missing}")
    return [(image, labels[key]) for key, image in images.items()]


def _read_label(tar, member, ending, field):
    try:
        data = TarFiles([tar], [0], [member])[0]
        value = int(data) if ending == "cls" else parse_json(data)[field]
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError
        return value
    except (ValueError, KeyError, TypeError):
        wanted = "a number" if ending == "cls" else f"a number at {field!r}"
        raise UserError(
            f"{tar}:{member.name} does not hold {wanted}; name the field, or write "
            "the label again"
        ) from None


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
        reason = (str(error).splitlines() or [""])[0]
        if "split" in reason:
            raise UserError(f"tfds, {name!r}: {reason}") from error
        raise UserError(
            f"tfds has no {name!r} prepared as array_record in {data_dir or 'its'} "
            "folder: preparing it needs TensorFlow, once, on any machine "
            f"(tfds build --file_format=array_record); {OTHER_SOURCES}"
        ) from error
