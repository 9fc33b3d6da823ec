"""Files to name, and scripts that may begin nothing with them."""

import hashlib
import importlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import caches
import numpy as np
import pytest
import small
from mistakes import SCRIPTS
from PIL import Image
from toy_codec import toy

from sit_jax.convert import vae_files
from sit_jax.data import extraction

PLACES = ("folder", "garbage", "images", "cache", "weights", "secret", "closed")


class Begun(BaseException):
    """What a case may not reach."""


@pytest.fixture(scope="module")
def place():
    """Files to name; everybody may read them."""
    root = Path(tempfile.mkdtemp(prefix="a place ö "))
    root.chmod(0o755)
    (root / "folder").mkdir()
    (root / "garbage").write_bytes(b"\x93NUM\0PY" * 50)
    (root / "x.png").write_bytes(b"kept")
    (root / "secret").write_bytes(b"x")
    (root / "secret").chmod(0)
    (root / "closed").mkdir(mode=0o555)
    Path(root / "images" / "class").mkdir(parents=True)
    for i in range(2):
        image = np.full((9, 9, 3), i, np.uint8)
        Image.fromarray(image).save(root / "images" / "class" / f"{i}.png")
    rng = np.random.default_rng(0)
    np.savez(root / "features.npz", features=rng.normal(size=(20, 4)))
    digits = rng.integers(0, 255, (4, 8, 8, 1), np.uint8)
    np.savez(root / "samples.npz", arr_0=digits, arr_1=np.arange(4))
    tags = caches.changed(shape=(4, 4, 2), scale=None, encoder_sha256=None)
    caches.write(root / "cache", tags)
    config = small.config()
    small.checkpoint(root / "weights", config)
    (root / "manifest.json").write_text(json.dumps({"job": _job(root, config)}))
    yield root
    shutil.rmtree(root)


def _job(root, config):
    from sit_jax.config import to_json
    from sit_jax.sampling.job import Job

    job = Job(str(root / "weights"), to_json(config), np.arange(3, dtype=np.int32))
    return job.to_json()


@pytest.fixture(scope="module")
def names(place):
    return {
        "config": Path(__file__).with_name("small_config.py"),
        "new": place / "new",
        "missing": place / "missing",
        "png": place / "x.png",
        "features": place / "features.npz",
        "samples": place / "samples.npz",
        "manifest": place / "manifest.json",
        "pid": os.getpid(),
        **{name: place / name for name in PLACES},
    }


@pytest.fixture
def sealed(monkeypatch):
    """Nothing may begin to compute."""

    def begin(*words, **fields):
        raise Begun

    modules = {name: importlib.import_module(name) for name in SCRIPTS}
    for script, name in (
        ("train", "_loop"),
        ("port_weights", "draft"),
        ("port_weights", "drafts"),
        ("quantize", "draft"),
        ("evaluate", "write_json"),
        ("score_digits", "score"),
    ):
        monkeypatch.setattr(modules[script], name, begin)
    monkeypatch.setattr(modules["sample"].sampling, "draw", begin)
    monkeypatch.setattr(extraction, "Encoder", begin)
    load = vae_files.load_vae
    toys = lambda source, *words: toy() if source == "x" else load(source, *words)
    monkeypatch.setattr(vae_files, "load_vae", toys)
    monkeypatch.setattr(modules["diagnose"], "collect", begin)
    monkeypatch.setattr(modules["diagnose"].diagnosis, "save", begin)
    return modules


def contents(root):
    """Hashes of all that is below, by path; locks of a moment left out."""
    return {
        path: path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
    }


def words(line, flag, value, names):
    """The command line of a case, as the shell would split it."""
    given = value.format(**names)
    line = [word.format(**names) for word in line.split()]
    if value.startswith("="):
        return [*line, flag + value]
    if flag.startswith("--config."):
        return [*line, f"{flag}={given}"]
    if not flag.startswith("--"):
        return [given, *line] if flag != "target" else [*line, given]
    return [*line, flag, given] if given.startswith("-") is False else [
        *line,
        f"{flag}={given}",
    ]  # fmt: skip


def clear(place):
    for left in place.glob("new*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
