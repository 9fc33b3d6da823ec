"""ArrayRecord files of moments: few files, any record by its number.

A record is 16 bytes (image id int64, label int32, mirrored int32, little-endian), then
the array. The two views of an image are two records, so that a reader takes the one it
wants. The last record of a file is JSON: what the file holds, as its writer knew it.
"""

import contextlib
import errno
import json
import os
import struct
import threading

import numpy as np

from sit_jax.errors import UserError
from sit_jax.files import parse_json

HEAD = struct.Struct("<qii")
WRITING = "group_size:1,uncompressed"  # floats hardly shrink, and zstd doubles the time
BLOCK, HEADERS = 2**16, 64  # bytes: as found by writing some
READING = "readahead_buffer_size:0,max_parallelism:0"  # for single records


def file_size(records, size):
    """Bytes of a file of records of `size` each; at most two blocks too many.

    A header stands before each, and data and index are filled up to blocks of 64 KiB.
    """
    return -(-records * (size + HEADERS) // BLOCK) * BLOCK + BLOCK


class ShardWriter:
    """Writes one file: add(...) for each image, then close(what)."""

    def __init__(self, path):
        self._path, self._file = path, _module().ArrayRecordWriter(str(path), WRITING)

    def add(self, i, label, views):
        """views [1 or 2, h, w, C], contiguous: as it is, and in the mirror."""
        with self._naming():
            for mirrored, view in enumerate(views):
                self._file.write(HEAD.pack(i, label, mirrored) + view.tobytes())

    def close(self, what):
        """Ends the file; a full disk may be noticed only here."""
        with self._naming():
            self._file.write(json.dumps(what).encode())
            self._file.close()

    @contextlib.contextmanager
    def _naming(self):
        try:
            yield
        except RuntimeError as error:
            reason = str(error).split(";")[0]
            if os.strerror(errno.ENOSPC) in reason:
                full = (errno.ENOSPC, os.strerror(errno.ENOSPC), self._path)
                raise OSError(*full) from error
            raise UserError(
                f"cannot write {self._path} ({reason}); free space, or write elsewhere"
            ) from error


class ShardReader:
    """Reads records of one file by number; opened at the first, safe in threads."""

    def __init__(self, path):
        self.path, self._file, self._lock = str(path), None, threading.Lock()

    def __getstate__(self):
        return {"path": self.path}

    def __setstate__(self, state):
        self.__init__(state["path"])

    def read(self, number):
        """-> bytes of record `number`; -1 is the last one."""
        try:
            if self._file is None:
                self._open()
            number = number if number >= 0 else self._file.num_records() + number
            return self._file.read([number])[0]
        except (ValueError, IndexError, RuntimeError) as error:
            self._refuse(error)

    def what(self):
        """The JSON at the end."""
        try:
            return parse_json(self.read(-1))
        except UserError:
            raise
        except ValueError as error:
            self._refuse(error)

    def _open(self):
        with self._lock:
            if self._file is None:
                file = _module().ArrayRecordReader(self.path, READING)
                if not file.num_records():
                    raise ValueError("it is missing, cut short or no ArrayRecord")
                self._file = file

    def _refuse(self, error):
        words = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"cannot read {self.path} ({words[:200]}); remove it and extract again"
        ) from error


def unpack(data, shape, dtype):
    """A record's bytes -> image id, label, array [shape] of dtype."""
    i, label, _ = HEAD.unpack_from(data)
    return i, label, np.frombuffer(data, dtype, offset=HEAD.size).reshape(shape)


def _module():
    try:
        from array_record.python import array_record_module
    except ImportError as error:
        raise UserError("caches are ArrayRecord: pip install array_record") from error
    return array_record_module
