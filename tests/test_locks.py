"""Two runs in one folder: the second hears of the first; a dead one holds nothing."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from sit_jax import locks
from sit_jax.errors import UserError

HOLD = """
import sys, time
from sit_jax.locks import alone
with alone(sys.argv[1]):
    print("holds", flush=True)
    time.sleep(60)
"""


def holder(folder):
    words = [sys.executable, "-c", HOLD, str(folder)]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holds\n"
    return process


def test_the_second_is_told_of_the_first_and_death_frees(tmp_path):
    with holder(tmp_path) as process:
        told = f"in use by process {process.pid} on {socket.gethostname()}; wait"
        with pytest.raises(UserError, match=told), locks.alone(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (tmp_path / ".lock").exists()  # left behind, and no obstacle
    with locks.alone(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("filled", [True, False])
def test_a_folder_made_for_a_lock_goes_if_nothing_came_into_it(tmp_path, filled):
    (tmp_path / "there").mkdir()
    with locks.alone(tmp_path / "there"):
        pass
    folder = tmp_path / "there" / "a" / "b"
    with contextlib.suppress(UserError), locks.alone(folder):
        if filled:
            (folder / "x").write_text("")
        raise UserError("refused by a later check")
    assert (tmp_path / "there").exists() and folder.parent.exists() == filled
    assert not filled or os.listdir(folder) == ["x"]


def test_a_folder_that_goes_meanwhile_is_made_again(tmp_path, monkeypatch):
    folder, left = tmp_path / "a", [1]

    def slow(path, *words, **fields):
        make(path, *words, **fields)
        if left and left.pop():
            path.rmdir()  # as the process before does

    make = type(folder).mkdir
    monkeypatch.setattr(type(folder), "mkdir", slow)
    with locks.alone(folder):
        assert os.listdir(folder) == [".lock"]


def test_who_comes_as_the_first_one_goes_is_not_refused(tmp_path, monkeypatch):
    """The first one's file is removed between our opening it and our locking it."""
    lock, calls = fcntl.flock, []

    def late(file, how):
        calls.append(how)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locks.alone(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"process {os.getpid()} "):
            with locks.alone(tmp_path):
                raise AssertionError
    assert len(calls) == 3


def test_other_names_do_not_meet(tmp_path):
    with locks.alone(tmp_path, "lock-0"), locks.alone(tmp_path, "lock-1"):
        pass


OURS = {"host": socket.gethostname(), "pid": os.getpid()}


@pytest.mark.parametrize(
    ("owner", "free"),
    [
        ({**OURS, "began": locks._began(os.getpid())}, False),
        ({**OURS, "began": "1"}, True),  # the number is another process's by now
        ({**OURS, "pid": 2**22 + 1, "began": "1"}, True),
        ({"host": "elsewhere", "pid": 1, "began": "1"}, False),
        ({**OURS, "pid": 2**22 + 1, "began": "1", "space": "pid:[1]"}, False),
        ("half a line", True),
    ],
)
def test_where_nothing_locks_the_file_tells(tmp_path, monkeypatch, owner, free):
    def refuse(*words):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    text = owner if isinstance(owner, str) else json.dumps(owner)
    (tmp_path / ".lock").write_text(text)
    if free:
        with locks.alone(tmp_path):
            pass
    else:
        with pytest.raises(UserError, match="in use by"), locks.alone(tmp_path):
            pass
        assert (tmp_path / ".lock").read_text() == text


def test_of_another_containers_process_nobody_is_sure():
    """Where containers share the host's name, 17 here may not be 17 there."""
    gone = {**OURS, "pid": 2**22 + 1, "began": "1"}
    assert locks._is_gone(gone) and locks._is_gone({**gone, "space": locks._space()})
    assert not locks._is_gone({**gone, "space": "pid:[1]"})
