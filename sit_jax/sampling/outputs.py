"""Writes what sample.py makes (a grid, arrays, a folder of PNGs), and reads arrays.

Everything appears by rename, so that an output is whole or not there. Rows of an .npz
member are taken from the zip stream, a few at a time: 50,000 images of 256 pixels are
9.8 GB. Files that end early, hold objects or would have to be unpickled are refused.
"""

import contextlib
import io
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.lib import format as npy

from sit_jax.errors import UserError
from sit_jax.experiment import Experiment
from sit_jax.files import as_path, atomic_write, file_size, is_taken, require_writable
from sit_jax.sampling.grid import captions, image_grid, save_gif, save_png

KINDS = (".png", ".npy", ".npz")
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    NotImplementedError,  # zipfile's for packing that it does not know
    RuntimeError,  # a password, or what a damaged compressed stream is called
    TypeError,
    RecursionError,
    LookupError,
    struct.error,
    MemoryError,
    lzma.LZMAError,
    OSError,
)
SMALL = 2**26  # bytes that may be unpacked from anything
TIMES = 100  # as large as it is packed may something larger be; photographs are 1 or 2
ROW = 2**28  # bytes: the least that is read at once


def check_output(path: Any, overwrite: bool) -> Path:
    """Returns the path of an output.

    Raises:
        UserError: it exists already, cannot be written, or has an unknown ending.
    """
    is_folder = str(path).endswith(("/", os.sep))
    path = as_path(path)
    if not is_folder and path.suffix not in KINDS:
        raise UserError(
            f"--out {path}: write a name ending in {', '.join(KINDS)}, or a folder/"
        )
    taken = any(path.iterdir()) if is_folder and path.is_dir() else is_taken(path)
    if taken and not overwrite:
        raise UserError(f"--out {path} exists; --overwrite replaces it")
    try:
        require_writable(path / "any" if is_folder else path)
    except UserError as error:
        raise UserError(f"--out {error}") from error
    return path


def wants_pictures(path: Path) -> bool:
    """Returns whether an output is of decoded images, and not of data."""
    return path.suffix != ".npy"


def check_codec(path: Path, parts: Experiment) -> None:
    """Raises a UserError if pictures are wanted of latents without a VAE."""
    if wants_pictures(path):
        one = jax.ShapeDtypeStruct((1, *parts.shape), np.float32)
        jax.eval_shape(parts.codec.decode, one)


def is_array(path: Any, array: np.ndarray) -> bool:
    """Returns whether a .npy holds the array, to the byte."""
    try:
        found = load_npy(path)
    except UserError:
        return False
    return found.dtype == array.dtype and np.array_equal(found, array)


def save_array(path: Any, array: np.ndarray) -> None:
    """Writes a .npy, whole or not at all."""
    with atomic_write(path) as name:
        np.save(name, array)


def assemble(
    path: Path,
    parts: Any,
    count: int,
    labels: np.ndarray,
    columns: int | None = None,
    frames: bool = False,
    names: dict[str, str] | None = None,
) -> None:
    """Writes the output of `count` batches; memory does not grow with the images.

    .npy: float32 [n, h, w, c] as the sampler returned it. .npz: ADM's arr_0, uint8
    [n, h, w, c], and the labels as arr_1. A folder: one PNG an image. .png: a grid.

    Args:
        path: the output.
        parts: run.Results.
        count: how many batches there are.
        labels: of the images.
        columns: tiles in a row of a grid.
        frames: whether images are [frames, h, w, c]; a grid then has a strip of each,
            and an animation beside it.
        names: {str(label): name}, written on a grid.
    """
    if path.suffix == ".png":
        images = np.concatenate(list(_all(parts, count)))
        _sheet(path, images, columns, frames, captions(labels, names))
    elif path.suffix == ".npz":
        with (
            atomic_write(path) as name,
            zipfile.ZipFile(name, "w", allowZip64=True) as file,
        ):
            _stream(file, "arr_0.npy", parts, count, len(labels))
            with file.open("arr_1.npy", "w") as entry:
                np.lib.format.write_array(entry, np.asarray(labels))
    elif path.suffix == ".npy":
        with atomic_write(path) as name, open(name, "wb") as file:
            for chunk in _npy(parts, count, len(labels)):
                file.write(chunk)
    else:
        _folder(path, parts, count)


def _all(parts, count):
    return (parts.images(batch) for batch in range(count))


def _npy(parts, count, total):
    """The bytes of a .npy file of all parts, one after the other."""
    first = parts.images(0)
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (total, *first.shape[1:]),
    }
    begin = io.BytesIO()
    np.lib.format.write_array_header_1_0(begin, header)
    yield begin.getvalue()
    for images in _all(parts, count):
        yield np.ascontiguousarray(images).tobytes()


def _stream(file, name, parts, count, total):
    with file.open(name, "w", force_zip64=True) as entry:
        for chunk in _npy(parts, count, total):
            entry.write(chunk)


def _folder(path, parts, count):
    for pattern in ("[0-9]*.png", ".[0-9]*.png"):
        for old in path.glob(pattern):  # of more images, or what a kill has left
            old.unlink()
    i = 0
    for images in _all(parts, count):
        for image in images:
            save_png(path / f"{i:06d}.png", image)
            i += 1


def _sheet(path, images, columns, frames, words):
    """images [N, h, w, C], with frames [N, F, h, w, C]; words: N captions or None."""
    if not frames:
        save_png(path, image_grid(images, columns, captions=words))
        return
    strips, length = images.reshape(-1, *images.shape[2:]), images.shape[1]
    each = words and [word for word in words for _ in range(length)]
    save_png(path, image_grid(strips, length, captions=each))
    states = np.swapaxes(images, 0, 1)
    moving = [image_grid(frame, columns, captions=words) for frame in states]
    save_gif(path.with_suffix(".gif"), moving)


def manifest_path(path: Path) -> Path:
    """Returns where the manifest of an output is: beside a file, inside a folder."""
    if path.suffix in KINDS:
        return path.with_name(f"{path.name}.manifest.json")
    return path / "manifest.json"


class ArrayFile:
    """An opened .npz; its members by name."""

    def __init__(self, path: Any):
        self.path = as_path(path)
        if not self.path.is_file():
            raise UserError(f"no file at {self.path}")
        with _plainly(f"{self.path} is no .npz file, or ends too early"):
            with _unzipping(self.path) as archive:
                members = archive.infolist()
        for member in members:
            _require_tame(self.path, member)
        names = [member.filename for member in members]
        self.names = [name[:-4] for name in names if name.endswith(".npy")]

    def __contains__(self, name):
        return name in self.names

    def member(self, name: str) -> "Member":
        """Returns an array by name; a UserError names what there is instead."""
        if name not in self.names:
            held = ", ".join(self.names) or "nothing"
            raise UserError(f"{self.path} has no array {name}, only {held}")
        return Member(self.path, name)

    def array(self, name: str) -> np.ndarray:
        """Returns a small array, whole."""
        member = self.member(name)
        size, packed = math.prod(member.shape) * member.dtype.itemsize, member.packed
        if size > max(SMALL, TIMES * packed):
            raise UserError(
                f"{self.path}: {name} unpacks from {packed} to {size} bytes, too many "
                "to be measurements; save it uncompressed if it is what you want"
            )
        if not member.shape:
            return next(member.parts(1)).reshape(())
        parts = list(member.parts(max(member.shape[0], 1)))
        return parts[0] if parts else np.empty(member.shape, member.dtype)


class Member:
    """One array of an .npz: shape, dtype, and its rows in order."""

    def __init__(self, path, name):
        self.path, self.name = path, name
        self.shape, self.dtype, size, start, found = self._header()
        self.packed, self._crc = found.compress_size, found.CRC
        _require_size(f"{path}: {name}", self.shape, self.dtype, size - start)

    def __len__(self):
        return self.shape[0]

    @property
    def identity(self) -> list:
        """CRC-32, dtype and shape: these tell arrays apart without reading them."""
        return [self._crc, str(self.dtype), list(self.shape)]

    def parts(
        self, rows: int, wanted: Iterable[int] | None = None
    ) -> Iterator[np.ndarray]:
        """Yields arrays [rows, ...] until the end; the last one may be shorter.

        wanted: only these of them, by ascending numbers.
        """
        row, count = self.shape[1:], self.shape[0] if self.shape else 1
        size = math.prod(row) * self.dtype.itemsize
        numbers = range(-(-count // rows)) if wanted is None else wanted
        with _plainly(f"{self.path}: {self.name} is damaged"):
            with _unzipping(self.path) as archive, self._open(archive) as file:
                _read_header(file)
                begin = file.tell()
                for number in numbers:
                    start = number * rows
                    shape = (min(rows, count - start), *row)
                    if file.tell() != begin + start * size:
                        file.seek(begin + start * size)
                    data = file.read(shape[0] * size)
                    if len(data) < shape[0] * size:
                        raise EOFError("it ends too early")
                    yield np.frombuffer(data, self.dtype).reshape(shape)

    def _header(self):
        with _plainly(f"{self.path}: {self.name} is damaged"):
            with _unzipping(self.path) as archive, self._open(archive) as file:
                shape, fortran, dtype = _read_header(file)
                found, start = archive.getinfo(f"{self.name}.npy"), file.tell()
        _require_numbers(f"{self.path}: {self.name}", dtype)
        if fortran and len(shape) > 1:
            raise UserError(
                f"{self.path}: {self.name} is in Fortran order; save "
                "np.ascontiguousarray of it"
            )
        return shape, dtype, found.file_size, start, found

    def _open(self, archive):
        return archive.open(f"{self.name}.npy")


@contextlib.contextmanager
def _unzipping(path):
    """An opened zip file; one in a bucket is read as far as it is used."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        yield archive


def _read_header(file):
    """Returns shape, whether it is in Fortran's order, and dtype."""
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"version {version} of the .npy format")
    try:
        return read[version](file)
    except Exception as error:  # Python's parser and tokenizer look at it
        words = str(error).splitlines() or [type(error).__name__]
        raise ValueError(words[0]) from error


def load_npy(path: Any) -> np.ndarray:
    """Reads the array of a .npy file, whole."""
    path = as_path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}")
    with _plainly(f"{path} is no whole .npy file"):
        with path.open("rb") as file:
            shape, fortran, dtype = _read_header(file)
            start, size = file.tell(), file_size(path)
            _require_numbers(path, dtype)
            _require_size(path, shape, dtype, size - start)
            array = np.frombuffer(file.read(size - start), dtype)
            return array.reshape(shape, order="F" if fortran else "C")


@contextlib.contextmanager
def _plainly(what):
    """Makes one line of damage; what the user may not read stays an OSError."""
    try:
        yield
    except PermissionError:
        raise
    except DAMAGED as error:
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} ({words[:200]})") from error


def _require_tame(path, member):
    """Refuses names that climb, and what unpacks to more than a file is worth."""
    name = member.filename
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise UserError(f"{path}: {name[:200]!r} leads out of it; save it again")
    packed = member.compress_size
    if packed > file_size(path):
        raise UserError(f"{path}: {name[:200]} has {packed} bytes, more than the file")


def _require_numbers(where, dtype):
    if dtype.hasobject:
        raise UserError(
            f"{where} holds Python objects, which are not read: save an array of "
            "numbers"
        )


def _require_size(where, shape, dtype, size):
    """Refuses a shape that is not of so many bytes, or whose rows are no rows."""
    wanted = math.prod(shape) * dtype.itemsize
    if size != wanted or min(shape, default=0) < 0:
        raise UserError(
            f"{where} is said to be {dtype} {list(shape)}, {wanted} bytes, but has "
            f"{size}"
        )
    row = math.prod(shape[1:]) * dtype.itemsize
    if shape and shape[0] > 0 and not 0 < row <= ROW:
        raise UserError(
            f"{where} is {dtype} {list(shape)}: a row of {row} bytes, where up to "
            f"{ROW} are read"
        )
