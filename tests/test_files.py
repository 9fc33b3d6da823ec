"""Files on a disk and in a bucket: atomic writes, locks, refusals, JSON."""

import io
import json
import logging
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from helpers import ROOT, checkpoints
from helpers.checkpoints import Memory, step

from sit_jax import checkpoint, files
from sit_jax.convert import peft, tensor_files
from sit_jax.convert.pretrained import fetch
from sit_jax.errors import UserError
from sit_jax.files import (
    as_path,
    atomic_write,
    atomic_writes,
    list_files,
    local_path,
    lock,
    require_free,
    require_space,
)
from sit_jax.sampling import outputs
from sit_jax.sampling.outputs import ArrayFile
from sit_jax.sampling.partial_results import PartialResults, remove_parts
from sit_jax.trainer.run_log import RunLog
from sit_jax.trainer.workdir import check_workdir, locked_workdir, open_workdir

bucket = checkpoints.bucket


# ---- names ----


@pytest.mark.parametrize("name", ["gs://", "gs:///x", "gs://Here/x", "gs://here//x"])
def test_as_path_refuses_what_is_no_bucket(name):
    with pytest.raises(UserError, match="is no gs://BUCKET/NAME"):
        as_path(name)


def test_as_path_refuses_other_storage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for ask in (as_path, checkpoint.find_step, fetch, lambda p: require_free(p, False)):
        with pytest.raises(UserError, match=r"s3://b/x.*: only paths of files"):
            ask("s3://b/x")
    with pytest.raises(UserError, match="gs://bucket/x: .*gcsfuse"):
        local_path("gs://bucket/x")
    assert not list(tmp_path.iterdir())


def test_local_path_takes_any_name_of_a_file_and_the_home_folder(monkeypatch):
    for name in ("a:b", "a/b://c", "hf:owner/repo/file", "C://x", "x"):
        assert local_path(name) == Path(name)
    monkeypatch.setenv("HOME", "/somewhere")
    assert local_path("~/x") == Path("/somewhere/x") and local_path(ROOT) == ROOT


# ---- atomic writes ----


def test_atomic_write_replaces_a_file_only_when_whole(tmp_path):
    path = tmp_path / "x.pt"
    path.write_text("old")
    path.chmod(0o600)
    with pytest.raises(RuntimeError), atomic_write(path) as name:
        name.write_text("half")
        assert path.read_text() == "old"
        raise RuntimeError
    assert os.listdir(tmp_path) == ["x.pt"] and path.read_text() == "old"
    with atomic_write(path) as name:
        assert name.name == "x.pt"
        name.write_text("new")
    assert os.listdir(tmp_path) == ["x.pt"] and path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("fails", [False, True])
def test_atomic_write_replaces_a_full_folder(tmp_path, monkeypatch, fails):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").touch()
    rename = os.rename

    def rename_but_not_the_new(source, target):
        if (Path(source) / "new").exists():
            raise KeyboardInterrupt
        rename(source, target)

    if fails:
        monkeypatch.setattr(os, "rename", rename_but_not_the_new)
    try:
        with atomic_write(tmp_path / "x") as name:
            name.mkdir()
            (name / "new").touch()
    except KeyboardInterrupt:
        assert fails
    there = [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")]
    assert there == ["x", "x/old" if fails else "x/new"]


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_atomic_write_on_a_full_disk_leaves_nothing(tmp_path, ending):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write, .*(too large|enforce fail)"):
            with atomic_write(tmp_path / f"x.{ending}") as name:
                tensor_files.write(name, {"a": np.ones(9_000, np.float32)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_require_free_and_require_space(tmp_path):
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match="x exists; --overwrite"):
        require_free(tmp_path / "x", overwrite=False)
    require_free(tmp_path / "x", overwrite=True)
    require_free(tmp_path / "y", overwrite=False)
    with pytest.raises(UserError, match="x is a file and no folder"):
        require_free(tmp_path / "x" / "y", overwrite=False)
    require_space(tmp_path / "new" / "y", 10)
    with pytest.raises(UserError, match=r"needs 1e\+09 GB"):
        require_space(tmp_path / "new" / "y", 1e18)


# ---- locks ----

HOLD = """
import sys, time
from sit_jax.files import lock
with lock(sys.argv[1]):
    print("holds", flush=True)
    time.sleep(60)
"""


def test_lock_names_its_holder_and_ends_with_it(tmp_path):
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "holds\n"
        owner = f"in use by process {holder.pid} on {socket.gethostname()}; wait"
        with pytest.raises(UserError, match=owner), lock(tmp_path):
            raise AssertionError
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (tmp_path / ".lock").exists()  # left behind, and no obstacle
    with lock(tmp_path), lock(tmp_path, "other"):
        assert f"process {os.getpid()} " in (tmp_path / ".lock").read_text()
        with pytest.raises(UserError, match="in use by"), lock(tmp_path):
            raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_lock_follows_no_link(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.lock: .*; name another place"):
        with lock(tmp_path / "run"):
            raise AssertionError
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.parametrize("filled", [True, False])
def test_lock_removes_folders_it_made_that_stay_empty(tmp_path, filled):
    folder = tmp_path / "a" / "b"
    with lock(folder):
        if filled:
            (folder / "x").write_text("")
    assert folder.parent.exists() == filled
    assert not filled or os.listdir(folder) == ["x"]


# ---- JSON ----


def test_read_json_refuses_what_is_none(tmp_path):
    path = tmp_path / "x.json"
    for text in ("{", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match="x.json is not JSON"):
            files.read_json(path)
    files.write_json(path, {"a": [1]})
    assert files.read_json(path) == {"a": [1]}


# ---- buckets; tests/slow/test_gs_run.py has the commands on a fake server ----


def test_as_path_refuses_a_bucket_that_is_not_there():
    with pytest.raises(UserError) as error:
        as_path("gs://elsewhere/run")
    said = str(error.value)
    assert said.startswith("gs://elsewhere: there is no such bucket")
    assert "gcloud auth" in said and "\n" not in said


def test_a_bucket_without_gcsfs(monkeypatch):
    def absent(*_, **__):
        raise ImportError("Please install gcsfs")

    files.bucket_storage.cache_clear()
    monkeypatch.setattr(fsspec, "filesystem", absent)
    with pytest.raises(UserError, match="gs:// needs gcsfs: pip install gcsfs"):
        as_path("gs://other/x")


def test_storage_errors_are_one_line():
    kind = type("Forbidden", (Exception,), {"__module__": "google.api_core"})
    said = files.describe_storage_error(kind("403 no storage.objects.create\nmore"))
    assert said.startswith("Google Cloud Storage: 403 no storage.objects.create; ")
    assert files.describe_storage_error(ValueError("x")) is None


def test_storage_libraries_log_no_tracebacks(capfd):
    files.bucket_storage.cache_clear()
    files.bucket_storage()
    logging.getLogger("gcsfs").error("Consumer caught an error.")
    assert capfd.readouterr().err == ""


def test_atomic_write_to_a_bucket(bucket):
    path = require_free(bucket / "a" / "x.npz", False)
    with atomic_write(path) as name:
        np.savez(name, arr_0=np.arange(3))
        assert not path.exists() and not files.is_remote(name)
    assert np.array_equal(ArrayFile(path).array("arr_0"), np.arange(3))
    assert not name.exists()
    with pytest.raises(UserError, match="gs://here/a/x.npz exists; --overwrite"):
        require_free(path, False)
    with pytest.raises(ZeroDivisionError), atomic_write(path) as name:
        name.write_text("")
        raise ZeroDivisionError
    assert "arr_0" in ArrayFile(path) and not name.exists()


def test_atomic_writes_sends_the_first_last(bucket):
    paths = [bucket / "x.pt", bucket / "x.pt.md"]
    with atomic_writes(paths) as folder:
        for path in paths:
            (folder / path.name).write_text("new")
    assert Memory.sent == ["gs://here/x.pt.md", "gs://here/x.pt"]


def test_run_log_of_a_bucket_goes_on(bucket):
    workdir = bucket / "run"
    for first, losses in ((0, {1: 3.0, 2: 2.0}), (1, {2: 1.0})):
        with RunLog(workdir, 2, first, stream=io.StringIO()) as log:
            for at, loss in losses.items():
                log.scalars(at, {"loss": loss})
            log.image(2, "samples", np.zeros((4, 4, 3), np.uint8))
            log.flush()
            assert (workdir / "metrics.jsonl").exists()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [(r["step"], r["loss"]) for r in map(json.loads, lines)] == [(1, 3), (2, 1)]
    names = set(list_files(workdir))
    assert {"log.txt", "samples/0000002.png"} <= names
    assert sum(name.startswith("tensorboard/") for name in names) == 2


def test_workdir_in_a_bucket(bucket):
    config = {"batch_size": 2, "seed": 0}
    folder = open_workdir("gs://here/run", config)
    assert folder == bucket / "run"
    assert files.read_json(folder / "config.json") == config
    before = list_files(bucket)
    with pytest.raises(UserError, match="another config"):
        with locked_workdir("gs://here/run", {"seed": 1}):
            raise AssertionError
    with (
        pytest.raises(UserError, match="no such weights"),
        locked_workdir("gs://here/new", {}),
    ):
        raise UserError("no such weights")
    assert list_files(bucket) == before and list(before) == ["run/config.json"]
    step(folder / "checkpoints", 5)
    with pytest.raises(UserError, match="is a checkpoint directory, not a workdir"):
        check_workdir("gs://here/run/checkpoints", config)


def test_parts_in_a_bucket(bucket):
    out = outputs.check_output("gs://here/out/x.npz", False)
    batches = [np.full((2, 4, 4, 3), i, np.uint8) for i in range(2)]
    parts = PartialResults(out, "digest")
    assert parts.missing(2) == [0, 1]
    parts.save(1, {"images": batches[1], "finished": np.ones(2)})
    assert PartialResults(out, "digest").missing(2) == [0]
    with pytest.raises(UserError, match="x.npz.parts holds parts of other samples"):
        PartialResults(out, "other")
    parts.save(0, {"images": batches[0]})
    assert PartialResults(out, "digest").check(2) == []
    images = (parts.read(batch)["images"] for batch in range(2))
    outputs.assemble(out, images, np.arange(4))
    remove_parts(out)
    assert list(list_files(bucket / "out")) == ["x.npz"]
    file = ArrayFile("gs://here/out/x.npz")
    assert np.array_equal(file.array("arr_0"), np.concatenate(batches))
    with pytest.raises(UserError, match="--out gs://here/out/x.npz exists"):
        outputs.check_output("gs://here/out/x.npz", False)


def test_a_bucket_file_that_is_mapped_is_copied_once(
    bucket, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("SIT_JAX_CACHE", str(tmp_path))
    path = bucket / "w" / "x.pt"
    path.write_text("weights")
    copies = [fetch("gs://here/w/x.pt") for _ in range(2)]
    assert copies[0] == copies[1] and copies[0].read_text() == "weights"
    assert capsys.readouterr().err.count("copied to") == 1
    time.sleep(0.01)
    path.write_text("others!")
    assert fetch(str(path)).read_text() == "others!"
    assert fetch("gs://here/w") == bucket / "w"  # a folder stays


def test_a_peft_folder_in_a_bucket_is_refused(bucket):
    (bucket / "adapter" / peft.CONFIG).write_text("{}")
    assert peft.is_adapter_folder("gs://here/adapter")
    assert not peft.is_adapter_folder("gs://here/run")  # a run's may be there
    with pytest.raises(UserError, match="gs://here/adapter: .*gcloud storage cp"):
        peft.read_adapter_files("gs://here/adapter")
