"""Training in two and four real processes: what one gives, and what if one ends.

Some minutes: pytest tests/slow/test_many_processes.py
"""

import signal
import time

import numpy as np
import pytest
from helpers import processes, small
from PIL import Image

from sit_jax import checkpoint

HEARTBEAT = 10  # seconds
LONG = ("--config.steps=400", "--config.save_every=20", "--config.preview=0")
SHORT = ("--config.steps=6", "--config.save_every=3", "--config.preview=5")
MORE = ("--config.steps=9", "--config.save_every=3", "--config.preview=0")


def words(workdir, *fields):
    config = ("train.py", "--config", "tests/helpers/small_config.py")
    return (*config, "--heartbeat", HEARTBEAT, "--workdir", workdir, *fields)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The workdir of nine steps in one process, which draws after six too."""
    workdir = tmp_path_factory.mktemp("one")
    drawing = ("--config.preview=5", "--config.sample_every=6")
    processes.run(1, *words(workdir, *MORE, *drawing))
    return workdir


@pytest.mark.parametrize("count", [2, 4])
def test_training_on_many_then_on_fewer(tmp_path, alone, count):
    """Six steps on many processes; three more on half, as by one process alone.

    Losses to 1e-5: Adam's steps carry the rounding of the first ones further.
    """
    processes.run(count, *words(tmp_path / "many", *SHORT))
    one, many = small.losses(alone), small.losses(tmp_path / "many")
    assert list(many) == list(range(1, 7))
    first = [one[step] for step in many]
    np.testing.assert_allclose(list(many.values())[:3], first[:3], rtol=1e-6)
    np.testing.assert_allclose(list(many.values()), first, rtol=1e-5)
    sheets = [path / "samples" / "0000006.png" for path in (alone, tmp_path / "many")]
    assert np.abs(np.subtract(*map(pixels, sheets))).max() <= 1
    said = processes.run(count // 2, *words(tmp_path / "many", *MORE))
    assert "goes on from step 6" in said
    many = small.losses(tmp_path / "many")
    assert list(many) == list(range(1, 10))
    np.testing.assert_allclose(list(many.values()), list(one.values()), rtol=1e-5)


def pixels(path):
    return np.asarray(Image.open(path), int)


def started(workdir, count):
    """A long run of `count` processes, in the middle."""
    each = processes.begin(count, *words(workdir, *LONG))
    log = workdir / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < 50:
        assert all(process.poll() is None for process in each), processes.end(each)
        time.sleep(0.02)
    return each


@pytest.mark.parametrize("victim", [0, 1])
def test_one_killed_ends_the_other_and_one_goes_on(tmp_path, victim):
    each, begun = started(tmp_path, 2), time.monotonic()
    each[victim].kill()
    found = processes.end(each)
    took = time.monotonic() - begun
    print(f"the other ended {took:.1f} s later with {found[1 - victim][0]}")
    assert took < HEARTBEAT + 10
    assert found[1 - victim][0] != 0, found
    newest = checkpoint.steps(tmp_path / "checkpoints")[-1]
    said = processes.run(1, *words(tmp_path, f"--config.steps={newest + 5}", *LONG[1:]))
    assert f"goes on from step {newest}" in said
    assert sorted(small.losses(tmp_path)) == list(range(1, newest + 6))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_signal_to_one_saves_the_same_step_on_all(tmp_path, number):
    each = started(tmp_path, 2)
    each[1].send_signal(number)
    found = processes.end(each)
    assert [code for code, *_ in found] == [0, 0], found
    newest = checkpoint.steps(tmp_path / "checkpoints")[-1]
    assert f"stopped at step {newest}; the same command" in found[0][1]
    assert newest < 400 and max(small.losses(tmp_path)) == newest


def test_second_run_is_refused_in_all_of_its_processes(tmp_path):
    first = started(tmp_path, 2)
    second = processes.end(processes.begin(2, *words(tmp_path, *LONG)))
    said = f"{tmp_path} is in use by process {first[0].pid}"
    for code, _, errors in second:
        assert code == 2 and said in errors.splitlines()[-1], errors
    first[1].terminate()
    assert [code for code, *_ in processes.end(first)] == [0, 0]


def test_workdir_that_process_0_cannot_make_ends_all(tmp_path):
    (tmp_path / "file").write_text("in the way")
    found = processes.end(processes.begin(2, *words(tmp_path / "file", *SHORT)))
    assert [code for code, *_ in found] == [2, 2], found
    for _, _, errors in found:
        assert str(tmp_path / "file") in errors.splitlines()[-1], errors


BAD = {
    "batch": ((), ("--config.batch_size=9",), "9 is not divisible by 2"),
    "other config": (("--config.seed=1",), (), "the config's sha256: "),
}


@pytest.mark.parametrize("name", BAD)
def test_mistake_is_one_line_of_each(tmp_path, name):
    last, all_of_them, line = BAD[name]
    port = f"localhost:{processes.free_port()}"
    each = []
    for index in range(2):
        place = ("--coordinator", port, "--processes", 2, "--process", index)
        more = last if index else ()
        each += processes.begin(1, *words(tmp_path / "x", *all_of_them, *more, *place))
    for index, (code, _, errors) in enumerate(processes.end(each, 60)):
        waiting, said = errors.splitlines()
        assert waiting == f"waiting for 2 processes at {port}, at most 300 s"
        assert code == 2 and said.startswith(f"process {index}: train.py: "), errors
        assert line in said, errors
    assert not (tmp_path / "x").exists()


ALONE = """
import argparse, sys
from sit_jax.parallel import multihost
parser = argparse.ArgumentParser()
multihost.add_flags(parser)
multihost.initialize(parser.parse_args(), join_seconds=3)
"""


def test_missing_process_ends_the_run_in_time():
    """By JAX's abort, after our line."""
    address = f"localhost:{processes.free_port()}"
    place = ("--coordinator", address, "--processes", 2, "--process", 0)
    begun = time.monotonic()
    [(code, _, errors)] = processes.end(processes.begin(1, "-c", ALONE, *place))
    assert code != 0 and time.monotonic() - begun < 40
    assert f"waiting for 2 processes at {address}, at most 3 s\n" in errors
    assert "DEADLINE_EXCEEDED" in errors
