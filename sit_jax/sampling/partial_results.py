"""Batches of a long run on disk, so that it can be killed and go on."""

import re
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

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

MARK = "job.json"
KEY = "part"  # the array in a batch that says whose it is


def parts_mark(out: Any) -> Path:
    """Returns the file that says whose the parts of an output are."""
    return as_path(f"{str(out).rstrip('/')}.parts") / MARK


def parts_size(out: Any) -> int:
    """Returns the bytes of the batches that are there."""
    return sum(_batch_files(parts_mark(out).parent).values())


def is_begun(out: Any, path: Any) -> bool:
    """Returns whether an unfinished run that makes `out` may write `path`."""
    return str(absolute_path(path)) in _read_mark(parts_mark(out)).get("writes", ())


def remove_parts(out: Any) -> None:
    """Removes the parts of an output."""
    mark = parts_mark(out)
    mark.unlink(missing_ok=True)  # first: what a kill leaves then belongs to nobody
    remove(mark.parent)


class PartialResults:
    """Batches in a folder beside the output, one file each, that belong to a job.

    Args:
        out: the output.
        digest: of the job. Parts of another digest are refused, or with overwrite
            removed.
        overwrite: see there.
        writes: paths that the run will write, and may replace when it goes on.
    """

    def __init__(
        self,
        out: Any,
        digest: str,
        overwrite: bool = False,
        writes: Iterable[Any] = (),
    ):
        self._digest, self.folder = digest, parts_mark(out).parent
        if _read_mark(parts_mark(out)).get("digest") == digest:
            return  # going on
        if self.folder.exists():
            if not overwrite:
                raise UserError(
                    f"{self.folder} holds parts of other samples; finish those with "
                    "their own command, or start over with --overwrite"
                )
            ours = {MARK, *_batch_files(self.folder)}
            for path in self.folder.iterdir():
                if path.name not in ours and path.name[0] != ".":
                    raise UserError(
                        f"{self.folder} holds {path.name}, which is no part of "
                        "anything; move the folder away"
                    )
            _warn(f"{self.folder} holds parts of another run, which are removed")
            remove(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        writes = [str(absolute_path(path)) for path in writes]
        write_json(self.folder / MARK, {"digest": digest, "writes": writes})

    def missing(self, count: int) -> list[int]:
        """Returns the numbers of batches below count that are still to be made."""
        names = _batch_files(self.folder)
        return [i for i in range(count) if self._path(i).name not in names]

    def check(self, count: int) -> list[int]:
        """Removes damaged batches, with a warning, and returns those to be made.

        To be called by one process, before any batch is made.
        """
        for path in self.folder.iterdir():
            if path.name.startswith("."):
                remove(path)  # which a kill has left
        for batch in set(range(count)).difference(self.missing(count)):
            if damage := self._find_damage(batch):
                _warn(f"{self._path(batch)} {damage}: it is removed and made again")
                self._path(batch).unlink()
        return self.missing(count)

    def save(self, batch: int, arrays: dict[str, np.ndarray]) -> None:
        """Writes arrays [n, ...] of a batch, by name."""
        with atomic_write(self._path(batch)) as name:
            np.savez(name, **arrays, **{KEY: self._key(batch)})

    def read(
        self, batch: int, names: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        """Returns the arrays of a batch: all, or those of the names that it has."""
        with (
            self._path(batch).open("rb") as file,
            np.load(file, allow_pickle=False) as arrays,
        ):
            stored = [name for name in arrays.files if name != KEY or names]
            return {n: arrays[n] for n in stored if names is None or n in names}

    def _path(self, batch):
        return self.folder / f"{batch:06d}.npz"

    def _key(self, batch):
        return np.array(f"{self._digest} {batch}")

    def _find_damage(self, batch):
        """Returns what is wrong with a batch, or None; reads all of it."""
        try:
            with self._path(batch).open("rb") as file:
                if member := zipfile.ZipFile(file).testzip():
                    return f"is damaged (sum of {member})"
            if self.read(batch, [KEY]).get(KEY) != self._key(batch):
                return "belongs to another run"
        except Exception as error:  # zipfile and NumPy raise anything of damage
            return f"is damaged ({str(error) or type(error).__name__})"


def _batch_files(folder):
    """Returns {name: bytes} of the batches in a folder."""
    sizes = list_files(folder).items()
    return {name: size for name, size in sizes if re.fullmatch(r"\d+\.npz", name)}


def _read_mark(path):
    try:
        mark = parse_json(path.read_text())
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}


def _warn(message):
    print(f"WARNING: {message}", file=sys.stderr, flush=True)
