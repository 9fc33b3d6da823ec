"""Photographs -> latents -> training -> samples -> npz, each killed on the way.

The commands of docs/start/own-pictures.md, in processes of their own, on generated
pictures and the recorded tests' small random VAE. A few minutes.
"""

import os
import subprocess
import sys
import time

import pytest
from helpers import ROOT, pictures, small

VAE = "tests/golden/vae"
SIZE, STEPS, NUM = 32, 60, 40
SMALL = [
    *("--config.shape=(4, 4, 4)", "--config.model.depth=2", "--config.model.width=32"),
    *("--config.model.heads=2", "--config.model.remat=none", "--config.batch_size=8"),
    f"--config.steps={STEPS}",
    *("--config.log_every=1", "--config.save_every=9", "--config.ema_decay=0.9"),
    *("--config.optimizer.learning_rate=0.01", "--config.preview=0"),
]


def extract(photos, place):
    return [
        *("extract_features.py", "--data", photos, "--vae", VAE, "--size", SIZE),
        *("--out", place / "latents", "--shards", 20, "--batch-size", 2),
    ]


def train(place):
    return [
        *("train.py", "--config", "configs/sit_xl2_cached.py", *SMALL),
        *("--workdir", place / "run", f"--config.source.path={place / 'latents'}"),
    ]


def sample(place):
    return [
        *("sample.py", "--weights", place / "run", "--vae", VAE, "--num", NUM),
        *("--sampler", "heun", "--steps", 8, "--batch-size", 2),
        *("--out", place / "samples.npz"),
    ]


def begin(words):
    one_device = {**os.environ, "XLA_FLAGS": ""}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    words = [sys.executable, *map(str, words)]
    return subprocess.Popen(words, cwd=ROOT, env=one_device, **pipe)


def end(words):
    process = begin(words)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def killed(words, happened):
    """Runs the command until that has happened, then kills it."""
    process = begin(words)
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.kill()
    process.communicate()


def count(folder, pattern):
    return len(list(folder.glob(pattern)))


def contents(folder):
    files = (file for file in folder.iterdir() if file.name != "manifest.json")
    return {file.name: file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    return pictures.folder(root, ("ant", "bee", "cat"), each=40, size=(44, 36))


def test_killed_at_each_stage_the_samples_are_the_same(photos, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for words in (extract(photos, whole), train(whole), sample(whole)):
        end(words)

    shards = lambda: count(broken / "latents", "moments-*")
    killed(extract(photos, broken), lambda: shards() >= 3)
    assert 3 <= shards() < 20 and not (broken / "latents" / "cache.json").exists()
    end(extract(photos, broken))
    assert contents(broken / "latents") == contents(whole / "latents")

    log = broken / "run" / "metrics.jsonl"
    logged = lambda: log.read_text().count("\n") if log.exists() else 0
    killed(train(broken), lambda: logged() >= 25)
    assert 25 <= logged() < STEPS
    assert "goes on from step" in end(train(broken))
    assert small.losses(broken / "run") == small.losses(whole / "run")

    parts = lambda: count(broken, "samples.npz.parts/*.npz")
    killed(sample(broken), lambda: parts() >= 3)
    assert 3 <= parts() < NUM // 2 and not (broken / "samples.npz").exists()
    end(sample(broken))
    one, other = (place / "samples.npz" for place in (whole, broken))
    assert one.read_bytes() == other.read_bytes()
