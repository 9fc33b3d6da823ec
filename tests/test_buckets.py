"""gs:// paths, with a bucket in memory in the place of Google's.

tests/slow/test_gs_run.py has the commands on a server that speaks Google's protocol.
"""

import io
import json
import time

import fsspec
import memory_bucket
import numpy as np
import pytest
import small
from memory_bucket import Memory, step

from sit_jax import buckets, mirrors, places
from sit_jax.convert import lora_files
from sit_jax.convert.releases import fetch
from sit_jax.drafts import draft, drafts, require_free
from sit_jax.errors import UserError
from sit_jax.places import place
from sit_jax.sampling import outputs
from sit_jax.sampling.array_files import ArrayFile
from sit_jax.sampling.parts import Parts
from sit_jax.trainer.logging import RunLog
from sit_jax.trainer.workdir import check_workdir, held, open_workdir, read_json

bucket = memory_bucket.bucket


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
