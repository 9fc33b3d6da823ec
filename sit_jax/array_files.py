"""Arrays in .npz files, read a few rows at a time and never whole.

The rows of a member are taken from the zip stream, whether it is compressed or not:
50,000 images of 256 pixels are 9.8 GB, and of these a batch is held. Files that end
early, hold objects or would have to be unpickled are refused.
"""

import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from sit_jax.errors import UserError

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError)


class ArrayFile:
    """An opened .npz; its members by name."""

    def __init__(self, path):
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise UserError(f"no file at {self.path}")
        try:
            with zipfile.ZipFile(self.path) as archive:
                names = archive.namelist()
        except DAMAGED as error:
            raise UserError(
                f"{self.path} is no .npz file, or ends too early ({error})"
            ) from error
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
        if not member.shape:
            return next(member.parts(1)).reshape(())
        parts = list(member.parts(max(member.shape[0], 1)))
        return parts[0] if parts else np.empty(member.shape, member.dtype)


class Member:
    """One array of an .npz: shape, dtype, and its rows in order."""

    def __init__(self, path, name):
        self.path, self.name = path, name
        self.shape, self.dtype, size, start = self._header()
        wanted = start + math.prod(self.shape) * self.dtype.itemsize
        if size != wanted:
            raise UserError(
                f"{path}: {name} is said to be {self.dtype} {list(self.shape)}, "
                f"{wanted} bytes, but has {size}"
            )

    def __len__(self):
        return self.shape[0]

    def parts(self, rows):
        """Yields arrays [rows, ...] until the end; the last one may be shorter."""
        row, count = self.shape[1:], self.shape[0] if self.shape else 1
        try:
            with zipfile.ZipFile(self.path) as archive, self._open(archive) as file:
                _read_header(file)
                for start in range(0, count, rows):
                    shape = (min(rows, count - start), *row)
                    wanted = math.prod(shape) * self.dtype.itemsize
                    data = file.read(wanted)
                    if len(data) < wanted:
                        raise EOFError("it ends too early")
                    yield np.frombuffer(data, self.dtype).reshape(shape)
        except DAMAGED as error:
            raise UserError(f"{self.path}: {self.name} is damaged ({error})") from error

    def _header(self):
        try:
            with zipfile.ZipFile(self.path) as archive, self._open(archive) as file:
                shape, fortran, dtype = _read_header(file)
                size, start = archive.getinfo(f"{self.name}.npy").file_size, file.tell()
        except DAMAGED as error:
            raise UserError(f"{self.path}: {self.name} is damaged ({error})") from error
        if dtype.hasobject:
            raise UserError(
                f"{self.path}: {self.name} holds Python objects, which are not read: "
                "save an array of numbers"
            )
        if fortran and len(shape) > 1:
            raise UserError(
                f"{self.path}: {self.name} is in Fortran order; save "
                "np.ascontiguousarray of it"
            )
        return shape, dtype, size, start

    def _open(self, archive):
        return archive.open(f"{self.name}.npy")


def _read_header(file):
    version = npy.read_magic(file)
    if version == (1, 0):
        return npy.read_array_header_1_0(file)
    if version == (2, 0):
        return npy.read_array_header_2_0(file)
    raise ValueError(f"version {version} of the .npy format")
