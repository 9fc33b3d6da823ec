"""Leases: one process at a time in a place on gs://."""

import json
import os
import socket
import threading
import time

import memory_bucket
import pytest

from sit_jax import interrupts, leases, locks
from sit_jax.errors import LATER, UserError

bucket = memory_bucket.bucket


def test_one_at_a_time(bucket):
    with locks.alone(bucket / "run"):
        held = leases.read(bucket / "run" / ".lock")
        assert held["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
            with locks.alone("gs://here/run"):
                raise AssertionError
    assert not (bucket / "run" / ".lock").exists()


@pytest.mark.parametrize(
    "host, pid, age, taken",
    [
        ("elsewhere", 1, 0, False),
        ("elsewhere", 1, leases.EXPIRED + 1, True),
        (socket.gethostname(), 2**22 + 1, 0, True),  # no such process here
        (socket.gethostname(), os.getpid(), 0, False),
    ],
    ids=["elsewhere", "long ago", "ended", "running"],  # the same in every process
)
def test_a_lease_ends_with_its_holder(bucket, host, pid, age, taken):
    owner = {"host": host, "pid": pid, "began": locks._began(pid)}
    lease = {**owner, "token": "a", "renewed": time.time() - age}
    (bucket / ".lock").write_text(json.dumps(lease))
    if not taken:
        with pytest.raises(UserError, match=f"process {pid} on {host}"):
            with locks.alone(bucket):
                raise AssertionError
        return
    with locks.alone(bucket):
        assert leases.read(bucket / ".lock")["token"] != "a"


def test_a_lease_is_renewed_and_its_loss_ends_the_process(bucket, monkeypatch, capsys):
    monkeypatch.setattr(leases, "RENEWED", 0.01)
    ended = threading.Event()

    def leave(code):
        assert code == 2
        ended.set()

    monkeypatch.setattr(leases.os, "_exit", leave)
    path = bucket / ".lock"
    with locks.alone(bucket):
        first = leases.read(path)["renewed"]
        begun = time.monotonic()
        while leases.read(path).get("renewed", first) == first:
            assert time.monotonic() - begun < 5
        theirs = {"token": "theirs", "renewed": time.time()}
        while not ended.is_set():  # a renewal under way may overwrite it once
            path.write_text(json.dumps(theirs))
            ended.wait(0.05)
            assert time.monotonic() - begun < 5
    assert "is held by another process now" in capsys.readouterr().err
    assert leases.read(path)["token"] == "theirs"  # not ours to remove


def test_of_two_that_take_over_one_does(bucket, monkeypatch):
    """The slower one saw the dead holder too; it may not remove the faster one's."""
    path = bucket / ".lock"
    dead = {"host": "elsewhere", "pid": 1, "token": "dead", "renewed": 0}
    live = {**dead, "token": "faster", "renewed": time.time()}
    path.write_text(json.dumps(dead))
    look = leases.read

    def slowly(path):
        held = look(path)
        if held.get("token") == "dead":
            path.write_text(json.dumps(live))
        return held

    monkeypatch.setattr(leases, "read", slowly)
    with pytest.raises(UserError, match="process 1 on elsewhere"):
        with locks.alone(bucket):
            raise AssertionError
    assert look(path) == live


def test_who_cannot_renew_ends_before_another_takes_over(bucket, monkeypatch, capsys):
    assert leases.LATE + leases.LOOK < leases.EXPIRED
    monkeypatch.setattr(leases, "LATE", 0.05)
    monkeypatch.setattr(leases, "LOOK", 0.01)
    ended = threading.Event()
    codes, left = [], []
    leave = lambda code: (codes.append(code), ended.set())
    monkeypatch.setattr(leases.os, "_exit", leave)
    with interrupts.made(int, left.append), locks.alone(bucket):
        assert ended.wait(5) and left == [0]
    assert ".lock was not renewed for 0.05 s: another run" in capsys.readouterr().err
    assert codes[0] == LATER  # a mistake would be 2, which ends a job for good


@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
def test_a_run_ends_well_though_the_network_is_gone(bucket, monkeypatch, capsys, hangs):
    monkeypatch.setattr(leases, "RENEWED", 0.01)
    monkeypatch.setattr(leases, "WAITED", 0.1)
    renewing, over, look = threading.Event(), threading.Event(), leases.read

    def read(path):
        renewing.set()
        if hangs and threading.current_thread() is not threading.main_thread():
            over.wait(5)
            return look(path)
        raise ConnectionError("no route")

    with locks.alone(bucket):
        monkeypatch.setattr(leases, "read", read)
        assert renewing.wait(5)
        begun = time.monotonic()
    assert time.monotonic() - begun < 3
    over.set()
    said = capsys.readouterr().err
    assert ".lock stays (ConnectionError: no route): nobody else may write" in said
