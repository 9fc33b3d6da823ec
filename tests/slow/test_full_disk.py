"""A disk that fills up, or may no longer be written, while something is written to it.

Two minutes, as root: pytest tests/slow/test_full_disk.py
"""

import contextlib
import subprocess
import time

import pytest
from helpers import commands, small

from sit_jax import checkpoint

FIELDS = {"steps": 400, "save_every": 10, "keep_last": 2}


@pytest.fixture
def disk(tmp_path):
    """-> a workdir whose checkpoints lie on a file system of 4 MB."""
    with mounted(tmp_path / "work" / "checkpoints") as folder:
        yield folder


@pytest.fixture
def place(tmp_path):
    """-> a folder on a file system of 16 MB."""
    with mounted(tmp_path / "place", "16m") as folder:
        yield folder


@contextlib.contextmanager
def mounted(folder, size="4m"):
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk):
    """Takes what is left, to the last byte."""
    with open(disk / "ballast", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


def forbid(disk):
    words = ["mount", "-o", "remount,ro", str(disk)]
    subprocess.run(words, check=True)


def allow(disk):
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    (disk / "ballast").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The losses of a run that nothing befalls."""
    workdir = tmp_path_factory.mktemp("unbroken")
    commands.ended(commands.start(workdir, **FIELDS | {"save_every": 400}))
    return small.losses(workdir)


@pytest.mark.parametrize(
    "spoil, said", [(fill, "No space left on device"), (forbid, "Read-only file sys")]
)
def test_it_stops_within_one_save_and_goes_on_when_it_can(disk, spoil, said, unbroken):
    work = disk.parent
    process = commands.start(work, **FIELDS)
    commands.until(process, lambda: len(checkpoint.steps(disk)) >= 2)
    spoil(disk)
    errors = commands.ended(process, code=2)
    last, newest = max(small.losses(work)), checkpoint.steps(disk)[-1]
    print(f"last step {last}, newest checkpoint {newest}: {errors.strip()}")
    # threads of Orbax may add that their event loop is closed
    (line,) = (line for line in errors.splitlines() if line.startswith("train.py: "))
    assert said in line
    assert last < newest + 2 * FIELDS["save_every"] + 1  # failing: the one after newest
    checkpoint.require_intact(disk, newest)
    allow(disk)
    commands.ended(commands.start(work, **FIELDS))
    assert small.losses(work) == unbroken


WORKS = (
    commands.sampling,
    commands.extraction,
    commands.evaluation,
    commands.statistics,
)


@pytest.mark.parametrize("make", WORKS, ids=lambda make: make.__name__)
def test_long_work_ends_in_one_line_and_goes_on(tmp_path, place, make):
    """Full a third of the way; with space again, the bytes of an unbroken run."""
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    work = make(inputs)
    unbroken = work.unbroken(place)
    process = work.begin(place)
    commands.ready(process)
    commands.until(process, lambda: work.parts(place) >= work.whole // 3)
    while process.poll() is None:  # it may still find what another file gives back
        fill(place)
        time.sleep(0.01)
    errors = commands.ended(process, code=2).splitlines()
    lines = [line for line in errors if "images/s]" not in line and line.strip()]
    print(lines)
    assert len(lines) == 1 and "No space left on device" in lines[0]
    assert not list(place.rglob(".*"))  # no unfinished output
    (place / "ballast").unlink()
    commands.ended(work.begin(place))
    assert work.contents(place) == unbroken
