"""A bucket in memory in the place of Google's, and a step of a checkpoint in it."""

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from sit_jax import files
from sit_jax.checkpoint.checksums import write_checksums
from sit_jax.files import COMMIT_FILE, as_path


class Memory(MemoryFileSystem):
    """Objects in this process, by Google's names; sent: in which order they came."""

    protocol, store, pseudo_dirs, sent = ("gcs", "gs"), {}, [""], []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def put_file(self, lpath, rpath, **more):
        self.sent.append(str(rpath))
        super().put_file(lpath, rpath, **more)


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
    """-> gs://here, which is empty."""
    forget = (
        backend.fsspec_backend._get_filesystem.cache_clear,
        files.bucket_storage.cache_clear,
        files.require_bucket.cache_clear,
    )
    monkeypatch.setitem(_registry, "gcs", Memory)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    for each in (Memory.store, Memory.sent):
        each.clear()
    Memory.pseudo_dirs[:] = ["", "/here"]
    for each in forget:
        each()
    yield as_path("gs://here")
    for each in forget:
        each()


def step(folder, number, mark=True):
    """A step as Orbax leaves it, with two items."""
    at = folder / str(number)
    for name in ("params/d/0", "params/manifest", "meta/metadata", "_METADATA"):
        (at / name).write_text(f"{name} of {number}")
    (at / "params" / COMMIT_FILE).write_text("")
    write_checksums(at)
    if mark:
        (at / COMMIT_FILE).write_text("")
    return at
