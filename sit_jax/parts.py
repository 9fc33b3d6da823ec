"""Batches on disk until all are there, so that a long run can be killed and go on."""

import shutil
from pathlib import Path

import numpy as np

from sit_jax import json_text
from sit_jax.drafts import draft
from sit_jax.errors import UserError
from sit_jax.workdir import write_json

MARK = "job.json"


def parts_mark(out):
    """The file that says whose the parts of an output are."""
    return Path(f"{str(out).rstrip('/')}.parts") / MARK


def parts_size(out):
    """Bytes of the batches that are there."""
    return sum(path.stat().st_size for path in parts_mark(out).parent.glob("*.npz"))


class Parts:
    """A folder beside the output, with one file a batch; it belongs to one digest."""

    def __init__(self, out, digest, overwrite=False):
        self.folder = parts_mark(out).parent
        self._mark(digest, overwrite)

    def missing(self, count):
        """-> numbers of the batches 0 .. count - 1 that are still to be made."""
        return [i for i in range(count) if not self._path(i).exists()]

    def save(self, batch, images, stats):
        """images [n, ...] of a batch, and its stats: arrays by name."""
        with draft(self._path(batch)) as name:
            np.savez(name, images=images, **stats)

    def images(self, batch):
        return self._read(batch, "images")

    def stats(self, batch, name, default=None):
        return self._read(batch, name, default)

    def remove(self):
        shutil.rmtree(self.folder)

    def _mark(self, digest, overwrite):
        mark = self.folder / MARK
        try:
            found = json_text.parse(mark.read_text()).get("digest")
        except (OSError, ValueError):
            found = None
        if found == digest:
            return  # going on
        if self.folder.exists() and not overwrite:
            raise UserError(
                f"{self.folder} holds parts of other samples; finish those with their "
                "own command, or start over with --overwrite"
            )
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        write_json(mark, {"digest": digest})

    def _path(self, batch):
        return self.folder / f"{batch:06d}.npz"

    def _read(self, batch, name, default=None):
        with np.load(self._path(batch), allow_pickle=False) as file:
            return file[name] if default is None or name in file else default
