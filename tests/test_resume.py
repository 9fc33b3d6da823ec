"""kill -9 at any moment, then the same command: as if nothing had happened."""

import signal

import pytest
import runs
import small

FIELDS = {"steps": 40, "save_every": 7}


def finish(workdir):
    runs.ended(runs.start(workdir, **FIELDS))
    return small.losses(workdir)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    found = finish(tmp_path_factory.mktemp("unbroken"))
    assert len(found) == FIELDS["steps"] == len(set(found.values()))
    return found


MOMENTS = {
    "before any checkpoint": lambda workdir: runs.logged(workdir, 3),
    "between checkpoints": lambda workdir: runs.logged(workdir, 24),
    "inside a save": lambda workdir: runs.saving(workdir, 21),
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
    process = runs.start(tmp_path, **FIELDS)
    runs.until(process, lambda: MOMENTS[moment](tmp_path))
    runs.kill(process)
    assert len(small.losses(tmp_path)) < FIELDS["steps"]
    assert finish(tmp_path) == unbroken
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(unbroken, tmp_path):
    process = runs.start(tmp_path, **FIELDS)
    runs.until(process, lambda: runs.logged(tmp_path, 10))
    process.send_signal(signal.SIGTERM)
    runs.ended(process)
    assert "stopped at step" in (tmp_path / "log.txt").read_text()
    assert finish(tmp_path) == unbroken
