"""Arrays in .npz files, read a few rows at a time and never whole.

The rows of a member are taken from the zip stream, whether it is compressed or not:
50,000 images of 256 pixels are 9.8 GB, and of these a batch is held. Files that end
early, hold objects or would have to be unpickled are refused.
"""

import contextlib
import lzma
import math
import struct
import zipfile
import zlib

import numpy as np
from numpy.lib import format as npy

from sit_jax.errors import UserError
from sit_jax.files import as_path, file_size

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


class ArrayFile:
    """An opened .npz; its members by name."""

    def __init__(self, path):
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

    def member(self, name):
        """-> Member; a UserError names what there is instead."""
        if name not in self.names:
            held = ", ".join(self.names) or "nothing"
            raise UserError(f"{self.path} has no array {name}, only {held}")
        return Member(self.path, name)

    def array(self, name):
        """A small array, whole."""
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
    def identity(self):
        """What tells it from others without reading it: CRC-32, dtype and shape."""
        return [self._crc, str(self.dtype), list(self.shape)]

    def parts(self, rows, wanted=None):
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
    """-> shape, whether it is in Fortran's order, dtype."""
    version = npy.read_magic(file)
    read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if version not in read:
        raise ValueError(f"version {version} of the .npy format")
    try:
        return read[version](file)
    except Exception as error:  # Python's parser and tokenizer look at it
        words = str(error).splitlines() or [type(error).__name__]
        raise ValueError(words[0]) from error


def load(path):
    """The array of a .npy file, whole."""
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
    """Damage as one line; what the user may not read stays an OSError."""
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
