"""A disk that fills up, or may no longer be written, while a run saves to it."""

import subprocess

import pytest
import runs
import small

from sit_jax import checkpoint

FIELDS = {"steps": 400, "save_every": 10, "keep_last": 2}


@pytest.fixture
def disk(tmp_path):
    """-> a workdir whose checkpoints lie on a file system of 4 MB."""
    folder = tmp_path / "work" / "checkpoints"
    folder.mkdir(parents=True)
    words = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"cannot mount a small file system: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(disk):
    """Takes what is left, to the last byte."""
    with open(disk / "ballast", "wb", buffering=0) as file:
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


@pytest.mark.parametrize(
    "spoil, said", [(fill, "No space left on device"), (forbid, "Read-only file sys")]
)
def test_it_stops_within_one_save_and_goes_on_when_it_can(disk, spoil, said, tmp_path):
    work, unbroken = disk.parent, tmp_path / "unbroken"
    process = runs.start(work, **FIELDS)
    runs.until(process, lambda: len(checkpoint.steps(disk)) >= 2)
    spoil(disk)
    errors = runs.ended(process, code=2)
    last, newest = max(small.losses(work)), checkpoint.steps(disk)[-1]
    print(f"last step {last}, newest checkpoint {newest}: {errors.strip()}")
    assert said in errors and errors.count("\n") == 1 and "Traceback" not in errors
    assert last < newest + 2 * FIELDS["save_every"] + 1  # failing: the one after newest
    checkpoint.require_whole(disk, newest)
    allow(disk)
    runs.ended(runs.start(work, **FIELDS))
    runs.ended(runs.start(unbroken, **FIELDS))
    assert small.losses(work) == small.losses(unbroken)
