"""kill -9 at any moment, then the same command: as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time

import pytest
import small
from conftest import ROOT

COMMAND = [sys.executable, "train.py", "--config", "tests/small_config.py"]
STEPS = 40
FIELDS = [f"--config.steps={STEPS}", "--config.save_every=7", "--config.preview=0"]


def start(workdir):
    words = [*COMMAND, "--workdir", str(workdir), *FIELDS]
    one_device = {**os.environ, "XLA_FLAGS": ""}  # eight take longer to compile for
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, cwd=ROOT, env=one_device, **quiet)


def finish(workdir):
    process = start(workdir)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    return small.losses(workdir)


def until(process, happened):
    """Waits for a moment; the run must not be over before it comes."""
    while not happened():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.001)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    found = finish(tmp_path_factory.mktemp("unbroken"))
    assert len(found) == STEPS and len(set(found.values())) == STEPS
    return found


def logged(workdir, step):
    log = workdir / "metrics.jsonl"
    return log.exists() and log.read_text().count("\n") >= step


def saving(workdir, step):
    """Whether a save of that step or a later one has begun and is not complete."""
    names = [path.name for path in (workdir / "checkpoints").glob("*tmp*")]
    return any(int(name.split(".")[0]) >= step for name in names)


MOMENTS = {
    "before any checkpoint": lambda workdir: logged(workdir, 3),
    "between checkpoints": lambda workdir: logged(workdir, 24),
    "inside a save": lambda workdir: saving(workdir, 21),
}


OFTEN = ("inside a save",)  # the others with make test-slow


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(name, marks=() if name in OFTEN else pytest.mark.slow)
        for name in MOMENTS
    ],
)
def test_losses_are_those_of_an_unbroken_run(unbroken, tmp_path, moment):
    process = start(tmp_path)
    until(process, lambda: MOMENTS[moment](tmp_path))
    process.kill()
    process.wait()
    process.stderr.close()
    broken = small.losses(tmp_path)
    assert len(broken) < STEPS
    assert finish(tmp_path) == unbroken
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(unbroken, tmp_path):
    process = start(tmp_path)
    until(process, lambda: logged(tmp_path, 10))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors.decode()
    assert "stopped at step" in (tmp_path / "log.txt").read_text()
    assert finish(tmp_path) == unbroken
