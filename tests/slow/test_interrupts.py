"""Ctrl-C in each script at random moments: a line within 5 seconds, and it goes on.

Five minutes: pytest tests/slow/test_interrupts.py
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import runs
import small
import works
from conftest import ROOT
from works import Work

from sit_jax import checkpoint

NAMES = {file.name for file in ROOT.glob("*.py")}
SAID = "interrupted; the same command goes on, or begins again"
MAKE = """
import sys, torch
from sit_jax.models.dit import SiT
from sit_jax.released import Released
released = Released(SiT(depth=12, width=384, heads=6), (32, 32, 4))
state = {name: torch.from_numpy(x) for name, x in released.constants.items()}
state |= {name: torch.randn(shape) for name, shape in released.trained.items()}
torch.save({"model": state, "ema": state}, sys.argv[1])
"""


def training(inputs):
    """Two workers; nothing is compiled beforehand, and a step not soon."""
    words = ("--config", "tests/small_config.py", "--config.steps=100000")
    more = ("--config.workers=2", "--config.save_every=40", "--config.preview=0")
    place = lambda place: (*words, *more, "--workdir", place / "run")
    return Work("train", place, None, 0)


def porting(inputs):
    return Work(
        "port_weights",
        lambda place: (_torch_file(inputs), place / "ck", "--family", "sit"),
        None,
        0,
    )


def quantization(inputs):
    return Work(
        "quantize",
        lambda place: (_torch_file(inputs), place / "w8", "--family", "sit"),
        None,
        0,
    )


def diagnosis(inputs):
    weights = small.checkpoint(inputs / "weights", small.config())
    drawn = ("--num", 4, "--sampler", "heun", "--steps", 4, "--out", inputs / "x.npz")
    done = small.script("sample.py", "--weights", weights, *drawn)
    assert done.returncode == 0, done.stderr
    manifest = inputs / "x.npz.manifest.json"
    return Work(
        "diagnose",
        lambda place: ("--collect", place / "b", "--from-manifest", manifest),
        None,
        0,
    )


def scoring(inputs):
    images = np.random.default_rng(0).integers(0, 256, (2000, 8, 8, 1), np.uint8)
    np.savez(inputs / "x.npz", arr_0=images, arr_1=np.arange(2000) % 10)
    place = lambda place: (inputs / "x.npz", "--out", place / "x.json")
    return Work("score_digits", place, None, 0)


def _torch_file(inputs):
    """SiT-S/2 twice, 0.26 GB, of random weights."""
    path = inputs / "s2.pt"
    if not path.exists():
        subprocess.run([sys.executable, "-c", MAKE, path], check=True)
    return path


SCRIPTS = {  # seconds after the imports in which something may be going on
    works.sampling: 10,
    works.extraction: 5,
    works.evaluation: 2,
    porting: 5,
    quantization: 3,
    diagnosis: 3,
    scoring: 1,
}


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """-> a check that processes have left nothing in memory or for temporary use."""
    temporary, shared = tmp_path / "tmp", Path("/dev/shm")
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    # nothing compiled before, so that many moments fall into XLA's compiler
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    before = set(shared.iterdir())

    def check(children):
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive
        assert not {path for path in set(shared.iterdir()) - before if path.exists()}
        assert not list(temporary.iterdir())

    return check


def interrupt(process, seconds):
    """Ctrl-C then -> seconds until the end, exit code, lines, children it had."""
    time.sleep(seconds)
    children = psutil.Process(process.pid).children(recursive=True)
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=60)
    return time.monotonic() - begun, process.returncode, said.splitlines(), children


@pytest.mark.parametrize("script", [*sorted(NAMES), "-m sit_jax.checkpoint"])
def test_ctrl_c_while_python_imports(script):
    """One line, and no traceback."""
    command = [sys.executable, *(script.split() if " " in script else [script])]
    process = subprocess.Popen(
        [*command, "--help"], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE
    )
    runs.until(process, lambda: _has_begun_to_import_jax(process.pid))
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=5)
    assert process.returncode == 130 and not out
    assert said.decode().endswith(": interrupted before it began\n")
    assert said.count(b"\n") == 1


def _has_begun_to_import_jax(pid):
    """Whether its compiled half is loaded: the rest takes a second more."""
    return "jaxlib" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("make", SCRIPTS, ids=lambda make: make.__name__)
def test_ctrl_c_ends_within_five_seconds_and_it_goes_on(tmp_path, quiet, make):
    inputs, place = tmp_path / "inputs", tmp_path / "place"
    inputs.mkdir(), place.mkdir()
    work, rng = make(inputs), random.Random(make.__name__)
    work.words(inputs)  # makes what it reads
    seconds = rng.uniform(0, SCRIPTS[make])
    while True:
        process = work.begin(place)
        works.ready(process)
        took, code, lines, children = interrupt(process, seconds)
        if code:
            break
        seconds /= 2  # it had done all by then
        shutil.rmtree(place)
        place.mkdir()
    print(f"after {seconds:.1f} s, ended {took:.1f} s later: {lines[-1:]}")
    assert took < 5 and code == 130, lines
    assert lines[-1] == f"{work.script}.py: {SAID}"
    assert not [line for line in lines if "Traceback" in line], lines
    assert not list(place.rglob(".*"))
    quiet(children)
    works.ended(work.begin(place))
    assert list(place.iterdir())
    for path in place.iterdir():
        assert checkpoint.steps(path) in ([], [0])  # or it would be half of one


MOMENTS = {  # what has happened before, and the longest it is waited after that
    "beginning": (lambda place: True, 0.5),
    "compiling": (lambda place: "GMAC an image" in _log(place), 3),
    "training": (lambda place: _last(place) >= 5, 1),
    # one save is under way, and the step in progress needs the next one
    "saving": (lambda place: runs.saving(place / "run", 40) and _last(place) > 40, 0),
}
SAVES = ("training", "saving")


@pytest.mark.parametrize("moment", MOMENTS)
def test_ctrl_c_in_training_saves_or_has_nothing_to_save(tmp_path, quiet, moment):
    """Within 5 seconds also while XLA compiles; then the same command goes on."""
    work, place = training(tmp_path), tmp_path / "place"
    happened, most = MOMENTS[moment]
    process = work.begin(place)
    works.ready(process)
    runs.until(process, lambda: happened(place))
    seconds = random.Random(moment).uniform(0, most)
    took, code, lines, children = interrupt(process, seconds)
    newest = max(checkpoint.steps(place / "run" / "checkpoints"), default=0)
    print(f"{moment}, ended {took:.1f} s later after step {newest}: {lines[-1:]}")
    assert took < 5, lines
    if moment == "beginning":
        assert (code, lines[-1]) == (130, f"train.py: {SAID}")
    elif moment in SAVES:
        assert "train.py: ends when this step is saved (" in "".join(lines)
        said = f"stopped at step {newest}; the same command goes on from there"
        assert code == 0 and said in _log(place)
    elif newest == 0:
        said = "stopped while compiling, after step 0; the same command goes on from"
        assert code == 0 and said in lines[-1]
    quiet(children)
    assert _last(place) == newest
    process = work.begin(place)
    runs.until(process, lambda: _last(place) >= newest + 5)
    process.send_signal(signal.SIGINT)
    works.ended(process)
    losses = small.losses(place / "run")
    assert list(losses) == list(range(1, len(losses) + 1)) and len(losses) > newest


def _last(place):
    """The last step that was logged."""
    there = (place / "run" / "metrics.jsonl").exists()
    return max(small.losses(place / "run"), default=0) if there else 0


def _log(place):
    path = place / "run" / "log.txt"
    return path.read_text() if path.exists() else ""
