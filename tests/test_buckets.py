"""gs:// paths, with a bucket in memory in the place of Google's.

tests/slow/test_gs_run.py has the commands on a server that speaks Google's protocol.
"""

import io
import json
import os
import socket
import threading
import time

import fsspec
import numpy as np
import pytest
import small
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from sit_jax import (
    buckets,
    checkpoint,
    interrupts,
    leases,
    locks,
    lora_files,
    mirrors,
    outputs,
    places,
)
from sit_jax.array_files import ArrayFile
from sit_jax.checkpoint.folder import set_aside, steps, unfinished
from sit_jax.checkpoint.sums import damages, write_sums
from sit_jax.drafts import draft, drafts, require_free
from sit_jax.errors import UserError
from sit_jax.logging import RunLog
from sit_jax.parts import Parts
from sit_jax.party import LOST
from sit_jax.places import MARK, place
from sit_jax.releases import fetch
from sit_jax.workdir import check_workdir, held, open_workdir, read_json


class Memory(MemoryFileSystem):
    """Objects in this process, by Google's names; sent: in which order they came."""

    protocol, store, pseudo_dirs, sent = ("gcs", "gs"), {}, [""], []

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("gs://"))

    def call(self, method, path, bucket, key, ifGenerationMatch):
        assert (method, path) == ("DELETE", "b/{}/o/{}")
        if places.version(place(f"gs://{bucket}/{key}"))[1] != ifGenerationMatch:
            raise FileExistsError(key)
        self.rm_file(f"gs://{bucket}/{key}")

    def put_file(self, lpath, rpath, **more):
        self.sent.append(str(rpath))
        super().put_file(lpath, rpath, **more)


@pytest.fixture(autouse=True)
def bucket(monkeypatch):
    """-> gs://here, which is empty."""
    forget = (
        backend.fsspec_backend._get_filesystem.cache_clear,
        buckets.system.cache_clear,
        buckets.require_answer.cache_clear,
    )
    monkeypatch.setitem(_registry, "gcs", Memory)
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    for each in (Memory.store, Memory.sent):
        each.clear()
    Memory.pseudo_dirs[:] = ["", "/here"]
    for each in forget:
        each()
    yield place("gs://here")
    for each in forget:
        each()


def step(folder, number, mark=True):
    """A step as Orbax leaves it, with two items."""
    at = folder / str(number)
    for name in ("params/d/0", "params/manifest", "meta/metadata", "_METADATA"):
        (at / name).write_text(f"{name} of {number}")
    (at / "params" / MARK).write_text("")
    write_sums(at)
    if mark:
        (at / MARK).write_text("")
    return at


@pytest.mark.parametrize("name", ["gs://", "gs:///x", "gs://Here/x", "gs://here//x"])
def test_names_that_are_none(name):
    with pytest.raises(UserError, match="is no gs://BUCKET/NAME"):
        place(name)


def test_a_bucket_that_is_not_there():
    with pytest.raises(UserError) as error:
        place("gs://elsewhere/run")
    said = str(error.value)
    assert said.startswith("gs://elsewhere: there is no such bucket")
    assert "gcloud auth" in said and "\n" not in said


def test_a_bucket_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(buckets, "PATIENCE", 0.05)
    monkeypatch.setattr(Memory, "info", lambda *_, **__: time.sleep(1))
    with pytest.raises(UserError, match="gs://slow: no answer in 0.05 s"):
        place("gs://slow/x")


def test_no_gcsfs(monkeypatch):
    def absent(*_, **__):
        raise ImportError("Please install gcsfs")

    buckets.system.cache_clear()
    monkeypatch.setattr(fsspec, "filesystem", absent)
    with pytest.raises(UserError, match="gs:// needs gcsfs: pip install gcsfs"):
        place("gs://other/x")


def test_what_goes_wrong_later_is_one_line():
    kind = type("Forbidden", (Exception,), {"__module__": "google.api_core"})
    said = buckets.fault(kind("403 no storage.objects.create\nmore"))
    assert said.startswith("Google Cloud Storage: 403 no storage.objects.create; ")
    assert buckets.fault(ValueError("x")) is None


def test_a_draft_becomes_an_object(bucket):
    path = require_free(bucket / "a" / "x.npz", False)
    with draft(path) as name:
        np.savez(name, arr_0=np.arange(3))
        assert not path.exists() and not places.in_bucket(name)
    assert np.array_equal(ArrayFile(path).array("arr_0"), np.arange(3))
    assert not name.exists()
    with pytest.raises(UserError, match="gs://here/a/x.npz exists; --overwrite"):
        require_free(path, False)
    with pytest.raises(ZeroDivisionError):
        with draft(path) as name:
            name.write_text("")
            raise ZeroDivisionError
    assert "arr_0" in ArrayFile(path) and not name.exists()


def test_of_several_the_first_is_sent_last(bucket):
    paths = [bucket / "x.pt", bucket / "x.pt.md"]
    with drafts(paths) as folder:
        for path in paths:
            (folder / path.name).write_text("new")
    assert Memory.sent == ["gs://here/x.pt.md", "gs://here/x.pt"]


def test_a_directory_of_steps_is_sent_mark_last(bucket):
    target = bucket / "ported"
    step(target, 3)  # of before
    with draft(target) as name:
        (name / "7" / "params").mkdir(parents=True)
        for file in ("params/x", "x", MARK):
            (name / "7" / file).write_text("")
    assert Memory.sent[-1] == f"gs://here/ported/7/{MARK}"
    assert steps(target) == [7]


def test_steps_are_those_with_their_mark(bucket):
    folder = bucket / "run" / "checkpoints"
    assert steps(folder) == [] and unfinished(folder) == []
    for number, mark in ((5, True), (10, True), (15, False)):
        step(folder, number, mark)
    (folder / "10.damaged" / "x").write_text("x")
    assert steps(folder) == [5, 10] and unfinished(folder) == [15]
    assert checkpoint.find("gs://here/run") == (folder, 10)
    assert checkpoint.find("gs://here/run/checkpoints/5") == (folder, 5)
    assert checkpoint.items(folder, 5) == {"params", "meta"}
    with pytest.raises(UserError, match="no checkpoint in gs://here/none"):
        checkpoint.find("gs://here/none")


@pytest.mark.parametrize("what", ["flipped", "missing", "more"])
def test_damage_in_a_bucket_is_noticed(bucket, what):
    at = step(bucket, 5)
    assert damages(at) == []
    file = at / "params" / "d" / "0"
    if what == "flipped":
        file.write_text("params/d/0 of 6")
    elif what == "missing":
        file.unlink()
    else:
        (at / "params" / "new").write_text("")
    (said,) = damages(at)
    words = {
        "flipped": "d/0 differs",
        "missing": "d/0 is missing",
        "more": "new has no",
    }
    assert f"params/{words[what]}" in said
    with pytest.raises(UserError, match="no step before it is whole"):
        checkpoint.require_whole(bucket, 5)


def test_a_damaged_step_is_set_aside(bucket):
    step(bucket, 5)
    before = {f"5.damaged/{n}" for n in places.files(bucket / "5")}
    assert set_aside(bucket, 5) == bucket / "5.damaged"
    assert steps(bucket) == [] and set(places.files(bucket)) == before


def test_one_at_a_time(bucket):
    with locks.alone(bucket / "run"):
        held = leases.read(bucket / "run" / ".lock")
        assert held["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
            with locks.alone("gs://here/run"):
                raise AssertionError
    assert not (bucket / "run" / ".lock").exists()


def test_what_is_refused_leaves_no_object(bucket):
    open_workdir("gs://here/run", {"seed": 0})
    before = places.files(bucket)
    with pytest.raises(UserError, match="another config"):
        with held("gs://here/run", {"seed": 1}):
            raise AssertionError
    with pytest.raises(UserError, match="no such weights"), held("gs://here/new", {}):
        raise UserError("no such weights")
    assert places.files(bucket) == before and list(before) == ["run/config.json"]


def test_libraries_log_no_tracebacks():
    """They raise besides, and what they raise is told in a line."""
    program = (
        "import contextlib, logging\n"
        "from sit_jax import buckets, errors\n"
        "with contextlib.suppress(errors.UserError): buckets.system()\n"
        "for name in ('gcsfs', 'fsspec.prefetcher'):\n"
        "    logging.getLogger(name).error('Consumer caught an error.')\n"
    )
    assert small.script("-c", program).stderr == ""


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
    with interrupts.tidied(lambda: left.append(True)), locks.alone(bucket):
        assert ended.wait(5)
    assert ".lock was not renewed for 0.05 s: another run" in capsys.readouterr().err
    assert codes[0] == LOST and left  # a mistake would be 2, which ends a job for good


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


def test_a_folder_of_peft_is_refused_with_what_to_do(bucket):
    (bucket / "adapter" / lora_files.CONFIG).write_text("{}")
    assert lora_files.is_adapter("gs://here/adapter")
    assert not lora_files.is_adapter("gs://here/run")  # a run's may be there
    with pytest.raises(UserError, match="gs://here/adapter: .*gcloud storage cp"):
        lora_files.read("gs://here/adapter")


def test_a_mirror_sends_what_changes(bucket, monkeypatch):
    monkeypatch.setattr(mirrors, "SENT", 3600)
    (bucket / "log.txt").write_text("before\n")
    with mirrors.mirrored(bucket, ["log.txt", "none"], besides=["wandb"]) as mirror:
        here = mirror.here
        with open(here / "log.txt", "a") as file:
            file.write("now\n")
        for folder in ("samples", "wandb"):
            (here / folder).mkdir()
            (here / folder / "x").write_text("x")
    assert (bucket / "log.txt").read_text() == "before\nnow\n"
    assert list(places.files(bucket)) == ["log.txt", "samples/x"]
    assert not here.exists()


def test_a_mirror_sends_beside_the_work(bucket, monkeypatch):
    monkeypatch.setattr(mirrors, "SENT", 0.01)
    begun = time.monotonic()
    with mirrors.mirrored(bucket) as mirror:
        (mirror.here / "x").write_text("x")
        while not (bucket / "x").exists():
            assert time.monotonic() - begun < 5
        Memory.sent.clear()
        time.sleep(0.05)
        assert not Memory.sent  # unchanged


def test_a_local_folder_is_its_own_mirror(tmp_path):
    with mirrors.mirrored(tmp_path) as mirror:
        mirror.send()
        assert mirror.here is tmp_path


def test_the_record_of_a_run_goes_on(bucket, tmp_path):
    workdir = bucket / "run"
    for first, losses in ((0, {1: 3.0, 2: 2.0}), (1, {2: 1.0})):
        with RunLog(workdir, 2, first, stream=io.StringIO()) as log:
            for at, loss in losses.items():
                log.scalars(at, {"loss": loss})
            log.image(2, "samples", np.zeros((4, 4, 3), np.uint8))
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [(r["step"], r["loss"]) for r in map(json.loads, lines)] == [(1, 3), (2, 1)]
    names = set(places.files(workdir))
    assert {"log.txt", "samples/0000002.png"} <= names
    assert sum(name.startswith("tensorboard/") for name in names) == 2


def test_a_workdir(bucket):
    config = {"batch_size": 2, "seed": 0}
    folder = open_workdir("gs://here/run", config)
    assert folder == bucket / "run" and read_json(folder / "config.json") == config
    with pytest.raises(UserError, match="gs://here/run belongs to another config"):
        check_workdir("gs://here/run", {"batch_size": 2, "seed": 1})
    step(folder / "checkpoints", 5)
    with pytest.raises(UserError, match="is a checkpoint directory, not a workdir"):
        check_workdir("gs://here/run/checkpoints", config)


def test_batches_and_what_becomes_of_them(bucket):
    out = outputs.check("gs://here/out/x.npz", False)
    batches = [np.full((2, 4, 4, 3), i, np.uint8) for i in range(2)]
    parts = Parts(out, "digest")
    assert parts.missing(2) == [0, 1]
    parts.save(1, {"images": batches[1], "finished": np.ones(2)})
    assert Parts(out, "digest").missing(2) == [0]
    with pytest.raises(UserError, match="x.npz.parts holds parts of other samples"):
        Parts(out, "other")
    parts.save(0, {"images": batches[0]})
    assert Parts(out, "digest").checked(2) == []
    outputs.assemble(out, parts, 2, np.arange(4))
    parts.remove()
    assert list(places.files(bucket / "out")) == ["x.npz"]
    file = ArrayFile("gs://here/out/x.npz")
    assert np.array_equal(file.array("arr_0"), np.concatenate(batches))
    with pytest.raises(UserError, match="--out gs://here/out/x.npz exists"):
        outputs.check("gs://here/out/x.npz", False)


def test_a_file_that_is_mapped_is_copied_once(bucket, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SIT_JAX_CACHE", str(tmp_path))
    path = bucket / "w" / "x.pt"
    path.write_text("weights")
    copies = [fetch("gs://here/w/x.pt") for _ in range(2)]
    assert copies[0] == copies[1] and copies[0].read_text() == "weights"
    assert capsys.readouterr().err.count("copied to") == 1
    path.write_text("others!")
    assert fetch(str(path)).read_text() == "others!"
    assert fetch("gs://here/w") == bucket / "w"  # a folder stays
    (bucket / "model0005.pt").write_text("")
    with pytest.raises(UserError, match="is one of several files; copy its folder"):
        fetch("gs://here/model0005.pt")
