"""Trees on a mesh, steps saved of them, and a bucket in memory."""

import jax
import numpy as np
import optax
import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from sit_jax import files
from sit_jax.checkpoint import Checkpoints
from sit_jax.checkpoint.checksums import write_checksums
from sit_jax.files import COMMIT_FILE, as_path
from sit_jax.parallel.mesh import make_mesh, with_shardings
from sit_jax.parallel.sharding_rules import zero1_shardings

META = {"step": 7, "config": {"model": {"depth": 2}, "clip": None}, "skipped": [1, 0]}


def trees(mesh, seed=0):
    """A state's items on a mesh, some leaves split over it, and what to load into."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    params = {"blocks": {"w": draw(2, 64, 256)}, "table": draw(2048, 16), "b": draw(3)}
    ema = jax.tree.map(lambda x: x / 3, params)
    opt_state = optax.adam(1e-3).init(params)
    opt_state = jax.tree.map(lambda x: np.asarray(x + 1), opt_state)
    state = {"params": params, "ema": ema, "opt_state": opt_state}
    where = zero1_shardings(mesh, state)
    like = with_shardings(jax.eval_shape(lambda: state), where)
    return jax.device_put(state, where), like


def mesh(n):
    return make_mesh(devices=jax.devices()[:n])


def saved(directory, state, *numbers, **options):
    saver = Checkpoints(directory, **options)
    for number in numbers:
        saver.save(number, {**META, "step": number}, **state)
        saver.wait()
    saver.close()


def equal(one, other):
    same = lambda a, b: a.dtype == b.dtype and np.array_equal(a, b)
    return jax.tree.all(jax.tree.map(same, jax.device_get(one), jax.device_get(other)))


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """-> directory with step 7, saved from eight devices."""
    directory = tmp_path_factory.mktemp("checkpoints")
    saved(directory, trees(mesh(8))[0], 7)
    return directory


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
