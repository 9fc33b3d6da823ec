"""Where the files inside a tar lie, so that they are read in place.

A reader of its own (POSIX.1-1988, GNU and pax headers) because an archive from
elsewhere is not to be trusted: names that climb, links, and sizes beyond the file or
beyond reason are refused, and nothing is ever unpacked.
"""

import os
from typing import NamedTuple

import numpy as np

from sit_jax.data.images import BrokenImage
from sit_jax.data.names import Names
from sit_jax.errors import UserError

BLOCK = 512
LARGEST = 2**27  # bytes of a file inside a tar, unless told otherwise
LONGEST = 2**20  # bytes of an extended header
PACKED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Member(NamedTuple):
    name: str
    offset: int  # of its first byte in the whole file
    size: int


class Members:
    """The bytes of files inside tars."""

    def __init__(self, paths, which, members):
        """paths: the tars; which [N]: the tar that each of the N members is in."""
        self._paths = [str(path) for path in paths]
        self._which = np.array(which, np.int32)
        self._offsets = np.array([m.offset for m in members], np.int64)
        self._sizes = np.array([m.size for m in members], np.int64)
        self.names = Names([m.name for m in members])

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        size = int(self._sizes[i])
        try:
            with open(self._paths[self._which[i]], "rb") as file:
                file.seek(int(self._offsets[i]))
                data = file.read(size)
        except OSError as error:
            raise BrokenImage(error.strerror or str(error)) from error
        if len(data) != size:
            raise BrokenImage(f"the tar ends {size - len(data)} bytes early")
        return data

    def name(self, i):
        return f"{self._paths[self._which[i]]}:{self.names[i]}"


def read_members(path, start=0, end=None, largest=LARGEST):
    """-> iterator of Member: the regular files of a tar, or of one inside it.

    A tar inside another lies between the bytes start and end of the file at path.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size if end is None else end
            yield from _walk(file, path, start, end, largest)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def _walk(file, path, at, end, largest):
    begun, said = at, {}  # what extended headers say of the next file
    while at < end:
        header = _bytes(file, at, BLOCK)
        if at == begun:
            _require_plain(header, path)
        if not any(header):
            return  # blocks of zeros end a tar
        name, size, kind = _parse(header, path, at)
        extended = kind in b"xLKg"
        if not extended:
            name, size = said.get("path", name), int(said.get("size", size))
        where = f"{path}: {name[:200]!r} at byte {at}"
        _require_sane(where, name, size, LONGEST if extended else largest)
        if at + BLOCK + size > end:
            raise UserError(
                f"{where} has {size} bytes, but only {end - at - BLOCK} are there; "
                "the tar is cut short, get it again"
            )
        if extended:
            said |= _extended(kind, _bytes(file, at + BLOCK, size), where)
        else:
            said = {}
        if kind in b"0\x007":
            yield Member(name, at + BLOCK, size)
        elif kind not in b"5xLKg":
            raise UserError(f"{where} is a link or a device, no file; make another tar")
        at += BLOCK + -(-size // BLOCK) * BLOCK


def _bytes(file, at, size):
    file.seek(at)
    return file.read(size)


def _require_plain(header, path):
    for magic, kind in PACKED.items():
        if header.startswith(magic):
            raise UserError(
                f"{path} is packed with {kind} and cannot be read in place; unpack it"
            )


def _parse(header, path, at):
    """-> name, size, kind (one byte) of a header."""
    try:
        if len(header) < BLOCK:
            raise ValueError
        if _number(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32:
            raise ValueError
        size = _number(header[124:136])
    except ValueError:
        raise UserError(
            f"{path} is no tar, or damaged at byte {at}; get it again"
        ) from None
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500])}/{name}"
    return name, size, header[156:157]


def _number(field):
    """Octal digits, or after a byte 128 the number itself (GNU)."""
    if field[0] & 128:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip() or b"0"
    if not digits.isdigit():
        raise ValueError
    return int(digits, 8)


def _text(field):
    return os.fsdecode(field.split(b"\0")[0])


def _extended(kind, data, where):
    """-> {"path": .., "size": ..}, as far as an extended header says so."""
    if kind == b"L":
        return {"path": _text(data)}
    said = {}
    while kind == b"x" and data.strip(b"\0"):
        try:
            length = int(data.split(b" ", 1)[0])
            key, value = data[:length].split(b" ", 1)[1][:-1].split(b"=", 1)
            if length < 5 or key == b"size" and not _is_size(value):
                raise ValueError
        except (ValueError, IndexError):
            raise UserError(f"{where} is a damaged header; get the tar again") from None
        if key in (b"path", b"size"):
            said[key.decode()] = os.fsdecode(value)
        data = data[length:]
    return said


def _is_size(value):
    return value.isdigit() and len(value) < 20


def _require_sane(where, name, size, largest):
    if name.startswith("/") or ".." in name.split("/") or "\\" in name:
        raise UserError(f"{where} leads out of the tar; make another tar")
    if size > largest:
        raise UserError(f"{where} says it has {size} bytes, more than {largest}")
