"""Batches on disk until all are there, so that a long run can be killed and go on."""

import contextlib
import re
import sys
import zipfile

import numpy as np

from sit_jax.errors import UserError
from sit_jax.files import (
    absolute_path,
    as_path,
    atomic_write,
    list_files,
    parse_json,
    remove,
    write_json,
)
from sit_jax.sampling.array_files import DAMAGED

MARK = "job.json"
KEY = "part"  # the array in a batch that says whose it is


def parts_mark(out):
    """The file that says whose the parts of an output are."""
    return as_path(f"{str(out).rstrip('/')}.parts") / MARK


def parts_size(out):
    """Bytes of the batches that are there."""
    return sum(_files(parts_mark(out).parent).values())


def is_begun(out, path):
    """Whether a run that makes `out`, and may write `path`, was not finished."""
    return str(absolute_path(path)) in _read_mark(parts_mark(out)).get("writes", ())


def remove_parts(out):
    """The mark first: what a kill leaves of it then belongs to nobody."""
    mark = parts_mark(out)
    mark.unlink(missing_ok=True)
    remove(mark.parent)


class Parts:
    """A folder beside the output, with one file a batch; it belongs to one digest.

    Those of another digest are refused, or with overwrite removed. writes: paths that
    the run will write, which it may replace when it goes on.
    """

    def __init__(self, out, digest, overwrite=False, writes=()):
        self._out, self._digest = out, digest
        self.folder = parts_mark(out).parent
        writes = [str(absolute_path(path)) for path in writes]
        self._mark({"digest": digest, "writes": writes}, overwrite)

    def missing(self, count):
        """-> numbers of the batches 0 .. count - 1 that are still to be made."""
        there = _files(self.folder)
        return [i for i in range(count) if self._path(i).name not in there]

    def checked(self, count):
        """As missing, of batches that are whole; others are named and removed.

        Before any are made, by one process.
        """
        for path in self.folder.iterdir():
            if path.name.startswith("."):
                remove(path)  # which a kill has left
        for batch in set(range(count)).difference(self.missing(count)):
            if why := self._damage(batch):
                _say(f"{self._path(batch)} {why}: it is removed and made again")
                self._path(batch).unlink()
        return self.missing(count)

    def save(self, batch, arrays):
        """arrays [n, ...] of a batch, by name."""
        with atomic_write(self._path(batch)) as name:
            np.savez(name, **arrays, **{KEY: self._key(batch)})

    def read(self, batch):
        """-> what was saved."""
        with self._opened(batch) as arrays:
            return {name: arrays[name] for name in arrays if name != KEY}

    def images(self, batch):
        return self._array(batch, "images")

    def stats(self, batch, name, default=None):
        return self._array(batch, name, default)

    def remove(self):
        remove_parts(self._out)

    def _mark(self, mark, overwrite):
        path = self.folder / MARK
        found = _read_mark(path)
        if found.get("digest") == mark["digest"]:
            return  # going on
        if self.folder.exists() and not overwrite:
            raise UserError(
                f"{self.folder} holds parts of other samples; finish those with their "
                "own command, or start over with --overwrite"
            )
        if self.folder.exists():
            self._require_ours()
            _say(f"{self.folder} holds parts of another run, which are removed")
            remove(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, mark)

    def _require_ours(self):
        """Or nobody knows what would be removed."""
        known = {MARK, *_files(self.folder)}
        for path in self.folder.iterdir():
            if path.name not in known and path.name[0] != ".":
                raise UserError(
                    f"{self.folder} holds {path.name}, which is no part of anything; "
                    "move the folder away"
                )

    def _path(self, batch):
        return self.folder / f"{batch:06d}.npz"

    def _key(self, batch):
        return np.array(f"{self._digest} {batch}")

    def _damage(self, batch):
        """What is wrong with a batch that is there, or None; all of it is read."""
        try:
            with self._path(batch).open("rb") as file:
                if odd := zipfile.ZipFile(file).testzip():
                    return f"is damaged (sum of {odd})"
            if self._array(batch, KEY, "") != self._key(batch):
                return "belongs to another run"
        except DAMAGED as error:
            return f"is damaged ({str(error) or type(error).__name__})"

    @contextlib.contextmanager
    def _opened(self, batch):
        """Arrays of a batch by name; only those that are asked for are read."""
        with self._path(batch).open("rb") as file:
            with np.load(file, allow_pickle=False) as arrays:
                yield arrays

    def _array(self, batch, name, default=None):
        with self._opened(batch) as arrays:
            return arrays[name] if default is None or name in arrays else default


def _files(folder):
    """-> {name: bytes} of the batches that are there."""
    there = list_files(folder).items()
    return {name: size for name, size in there if re.fullmatch(r"\d+\.npz", name)}


def _read_mark(path):
    try:
        found = parse_json(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _say(words):
    print(f"WARNING: {words}", file=sys.stderr, flush=True)
