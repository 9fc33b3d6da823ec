"""Commands in processes of their own, to be watched and ended at any moment."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from helpers import ROOT, pictures, small
from PIL import Image

COMMAND = [sys.executable, "train.py", "--config", "tests/helpers/small_config.py"]


def start(workdir, devices=1, **fields):
    """Begins a run; fields: of its config. Eight devices take longer to compile for."""
    set_fields = [f"--config.{name}={value}" for name, value in fields.items()]
    words = [*COMMAND, "--workdir", str(workdir), "--config.preview=0", *set_fields]
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # so that a signal can go to it and its workers alone
    )


def ended(process, code=0, timeout=300):
    """Waits for a run to end with that exit code; -> what it wrote to stderr."""
    _, errors = process.communicate(timeout=timeout)
    assert process.returncode == code, errors
    return errors


def kill(process):
    process.kill()
    process.wait()
    process.stderr.close()


def until(process, happened):
    """Waits for a moment; the run must not be over before it comes."""
    while not happened():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)


def logged(workdir, step):
    log = workdir / "metrics.jsonl"
    return log.exists() and max(small.losses(workdir), default=0) >= step


def saving(workdir, step):
    """Whether a save of that step or a later one has begun and is not complete."""
    names = [path.name for path in (workdir / "checkpoints").glob("*.orbax-check*tmp*")]
    return any(int(name.split(".")[0]) >= step for name in names)


RUN = """
import sys, time
from sit_jax.cli import {script}
{patch}
sys.argv[0] = "{script}.py"
print("ready", file=sys.stderr, flush=True)
{script}.main()
"""
ENCODER = """
from sit_jax.cli import extract_features
from helpers.codecs import toy
read = extract_features.ImageFolder.read
extract_features.ImageFolder.read = lambda s, i: (time.sleep(0.01), read(s, i))[1]
extract_features.load_codec = lambda vae, precision: toy()
"""
NETWORK = """
from helpers import toy_inception as t
from sit_jax.evaluation.features import FeatureExtractor

class Slow(FeatureExtractor):
    def __call__(self, batches):
        return super().__call__((time.sleep(0.05), each)[1] for each in batches)

def get_extractor(name, path, size):
    made = t.extractor(t.weights(), None, size)
    return Slow(t.toy, made.params, made.mesh, size, made.pipeline)

evaluate.get_extractor = get_extractor
t.evaluation.MIN_IMAGES = 205
"""


@dataclasses.dataclass(frozen=True)
class Work:
    """words(place): arguments, of which all paths written to lie in the folder place.

    parts(place): how many batches are done; whole: how many there are. same(path):
    what must come out alike of a file, by default its bytes.
    """

    script: str
    words: Callable
    parts: Callable
    whole: int
    patch: str = ""
    same: Callable = Path.read_bytes

    def begin(self, place, **environ):
        run = RUN.format(script=self.script, patch=self.patch)
        words = [sys.executable, "-c", run, *map(str, self.words(place))]
        flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
        return subprocess.Popen(
            words,
            cwd=ROOT,
            env={**os.environ, **flags, **environ},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that a signal can go to all of it
        )

    def contents(self, place):
        files = (path for path in place.rglob("*") if path.is_file())
        return {str(path.relative_to(place)): self.same(path) for path in files}

    def unbroken(self, place):
        """-> contents of a run in an empty folder, which is empty again."""
        ended(self.begin(place))
        found = self.contents(place)
        for path in place.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return found


def ready(process):
    """Waits until the imports are done."""
    line = process.stderr.readline()
    assert line == "ready\n", line + process.stderr.read()


def sampling(inputs):
    """400 images in 100 batches."""
    weights = small.checkpoint(inputs / "weights", small.config(shape=(8, 8, 1)))
    return Work(
        "sample",
        lambda place: (
            *("--weights", weights, "--out", place / "x.npz", "--labels", "random"),
            *("--num", 400, "--batch-size", 4, "--sampler", "heun", "--steps", 60),
        ),
        lambda place: _count(place / "x.npz.parts"),
        100,
        same=lambda path: (
            _record(path) if path.suffix == ".json" else path.read_bytes()
        ),
    )


def extraction(inputs):
    """480 images in 60 shards."""
    root = pictures.folder(inputs / "images", each=160, size=(10, 8))
    return Work(
        "extract_features",
        lambda place: (
            *("--data", root, "--vae", "x", "--size", 8, "--out", place / "latents"),
            *("--shards", 60, "--batch-size", 4, "--threads", 1),
        ),
        lambda place: len(list((place / "latents").glob("moments-*"))),
        60,
        patch=ENCODER,
    )


def evaluation(inputs):
    """900 images of 12 numbers against 300 in a folder, 30 batches and 10."""
    images = _images(inputs / "s.npz")
    (inputs / "r").mkdir()
    for i, image in enumerate(images[:300] // 2):
        Image.fromarray(image).save(inputs / "r" / f"{i}.png")
    return Work(
        "evaluate",
        lambda place: (
            *(inputs / "s.npz", "--reference", inputs / "r", "--batch-size", 30),
            *("--out", place / "x.json", "--save-features", place / "f.npz"),
            *("--bootstrap", 4000, "--kid"),
        ),
        lambda place: sum(
            _count(place / f"x.json.{side}.parts") for side in ("samples", "reference")
        ),
        40,
        patch=NETWORK,
    )


def statistics(inputs):
    """Of the same 900 images, in 30 batches."""
    _images(inputs / "d.npz")
    return Work(
        "evaluate",
        lambda place: (
            *("--stats", inputs / "d.npz", "--batch-size", 30),
            *("--out", place / "ref.npz"),
        ),
        lambda place: _count(place / "ref.npz.statistics.parts"),
        30,
        patch=NETWORK,
    )


def _images(path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (900, 2, 2, 3)).astype(np.uint8)
    np.savez(path, arr_0=images)
    return images


def _count(folder):
    return len(list(folder.glob("[0-9]*.npz")))


def _record(path):
    """A manifest without the time it took."""
    record = json.loads(path.read_text())
    return {name: value for name, value in record.items() if name != "seconds"}
