"""Long commands on small inputs, in processes of their own, to be ended at any moment.

A Work is begun, shows how far it is, and leaves contents that can be compared.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from conftest import ROOT
from helpers import photographs, small
from PIL import Image

RUN = """
import sys, time
import {script}
{patch}
sys.argv[0] = "{script}.py"
print("ready", file=sys.stderr, flush=True)
{script}.main()
"""
ENCODER = """
from sit_jax.cli import extract_features
from helpers.toy_codec import toy
read = extract_features.ImageFolder.read
extract_features.ImageFolder.read = lambda s, i: (time.sleep(0.01), read(s, i))[1]
extract_features.load_codec = lambda vae, precision: toy()
"""
NETWORK = """
import numpy as np
import judged as t
from sit_jax.features import FeatureExtractor

class Slow(FeatureExtractor):
    def __call__(self, batches):
        return super().__call__((time.sleep(0.05), each)[1] for each in batches)

evaluate.inception.load_inception = lambda path: t.weights()
evaluate.inception_extractor = lambda weights, mesh, size: Slow(
    t.toy, weights.params, mesh, size, t.pipeline(weights)
)
t.evaluation.LEAST = 205
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


def ended(process, code=0, timeout=300):
    """-> the lines of stderr, of which the first is skipped."""
    _, errors = process.communicate(timeout=timeout)
    assert process.returncode == code, errors
    return errors.splitlines()


def kill(process):
    process.kill()
    process.wait()
    process.stderr.close()


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
    root = photographs.folder(inputs / "images", each=160, size=(10, 8))
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
