"""Steps are saved in the background, found, and loaded on any number of devices."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import checkpoints, small
from helpers.checkpoints import META, equal, mesh, saved, trees

from sit_jax import checkpoint
from sit_jax.checkpoint import (
    Checkpoints,
    DamagedCheckpoint,
    find_step,
    load,
    read_meta,
    steps,
    store,
)
from sit_jax.errors import UserError
from sit_jax.parallel.mesh import replicated

one_step = checkpoints.one_step


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_load_places_a_step_of_eight_devices_on_any_number(one_step, devices):
    state, like = trees(mesh(devices))
    found = load(one_step, 7, **like)
    assert equal(found, state) and read_meta(one_step, 7) == META
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(
        lambda x: x.sharding, like
    )


def test_load_splits_a_step_of_one_device_over_eight(tmp_path):
    saved(tmp_path, trees(mesh(1))[0], 3)
    state, like = trees(mesh(8))
    found = load(tmp_path, 3, **like)
    assert equal(found, state)
    held = found["params"]["blocks"]["w"].addressable_shards
    assert {shard.data.shape for shard in held} == {(2, 64, 32)}


def test_load_reads_only_the_items_asked_for(one_step, tmp_path):
    """Sampling needs the average alone: with the rest gone it still loads."""
    state, like = trees(mesh(1))
    shutil.copytree(one_step, tmp_path / "copy")
    for name in ("params", "opt_state"):
        shutil.rmtree(tmp_path / "copy" / "7" / name)
    found = load(tmp_path / "copy", 7, ema=like["ema"])
    assert list(found) == ["ema"] and equal(found["ema"], state["ema"])
    with pytest.raises(DamagedCheckpoint, match="params/.* is missing"):
        load(tmp_path / "copy", 7, params=like["params"])
    with pytest.raises(UserError, match="has no 'losses'"):
        load(tmp_path / "copy", 7, losses=like["params"])


ALONE = """
import sys
import jax, numpy as np, orbax.checkpoint as ocp
from pathlib import Path
step, out = Path(sys.argv[1]), sys.argv[2]
place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
shaped = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
with ocp.StandardCheckpointer() as checkpointer:
    saved = checkpointer.metadata(step / "params").item_metadata.tree
    like = jax.tree.map(shaped, saved)
    params = checkpointer.restore(step / "params", like)
with ocp.CheckpointManager(step.parent) as manager:
    args = {"ema": ocp.args.StandardRestore(like), "meta": ocp.args.JsonRestore()}
    found = manager.restore(manager.latest_step(), args=ocp.args.Composite(**args))
assert found.meta["step"] == 7 and not [m for m in sys.modules if "sit_jax" in m]
np.savez(out, *jax.tree.leaves(params), *jax.tree.leaves(found.ema))
"""


def test_orbax_alone_reads_a_step(one_step, tmp_path):
    """What we do not let it write (its array_metadatas) is not needed."""
    environ = {**os.environ, "PYTHONPATH": ""}
    words = [sys.executable, "-c", ALONE, one_step / "7", tmp_path / "x.npz"]
    subprocess.run(words, cwd=tmp_path, env=environ, check=True)
    state, _ = trees(mesh(8))
    with np.load(tmp_path / "x.npz") as found:
        assert equal(
            list(found.values()),
            jax.tree.leaves(state["params"]) + jax.tree.leaves(state["ema"]),
        )


def test_load_refuses_another_architecture_and_lists_differences(one_step):
    _, like = trees(mesh(1))
    params = dict(like["params"])
    params["tables"] = params.pop("table")
    params["b"] = jax.ShapeDtypeStruct((4,), np.float32, sharding=params["b"].sharding)
    with pytest.raises(UserError) as error:
        load(one_step, 7, params=params)
    said = str(error.value)
    for part in (
        "missing tables",
        "extra table",
        "b is (3,), not (4,)",
        "another arch",
    ):
        assert part in said
    assert "blocks" not in said and "\n" not in said


@pytest.mark.parametrize(
    "number, said", [(errno.ENOSPC, "No space left"), (errno.EACCES, "Permission den")]
)
def test_check_raises_what_failed_in_the_background(
    tmp_path, monkeypatch, number, said
):
    def fails(_):
        raise OSError(number, os.strerror(number))

    state = {"params": {"w": np.arange(5.0)}}
    saver = Checkpoints(tmp_path, keep_last=1)
    saver.save(1, META, **state)
    saver.wait()
    saver.check()
    monkeypatch.setattr(store, "write_checksums", fails)
    saver.save(2, META, **state)
    with pytest.raises(UserError, match=f"{tmp_path}: {said}"):
        for _ in range(1000):
            saver.check()
            time.sleep(0.01)
    assert steps(tmp_path) == [1]  # keep_last=1, and yet the good one is kept
    checkpoint.require_intact(tmp_path, 1)


def test_save_compiles_nothing(tmp_path):
    """Slices of what eight devices hold alike were a program each, 7 s of them."""
    whole = jax.device_put(np.ones((8, 37), np.float32), replicated(mesh(8)))
    state, built = {"params": {"w": whole}}, []
    hear = lambda event, seconds, **more: built.append(event)
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        saved(tmp_path, state, 7)
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
    assert not [event for event in built if event.startswith("/jax/core/compile")]


def test_checkpoints_keep_the_last_and_every_nth_step(tmp_path):
    state, _ = trees(mesh(1))
    small = {"params": {"b": state["params"]["b"]}}
    saved(tmp_path, small, *range(1, 9), keep_last=2, keep_every=3)
    assert steps(tmp_path) == [3, 6, 7, 8]


def test_unfinished_step_is_no_step_and_is_cleaned_away(one_step, tmp_path):
    """What a kill inside a save leaves: Orbax's folder under a temporary name."""
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    torn = tmp_path / "8.orbax-checkpoint-tmp-1234"
    (torn / "params.orbax-checkpoint-tmp-1234").mkdir(parents=True)
    assert steps(tmp_path) == [7] and find_step(tmp_path)[1] == 7
    saver = Checkpoints(tmp_path)
    state, like = trees(mesh(1), seed=1)
    saver.save(8, META, **state)
    saver.close()
    assert not torn.exists()
    assert equal(load(tmp_path, 8, **like), state)


def test_find_step_takes_a_workdir_or_its_checkpoints(one_step, tmp_path):
    shutil.copytree(one_step, tmp_path / "checkpoints")
    (tmp_path / "samples").mkdir()
    for path in (tmp_path, tmp_path / "checkpoints", str(tmp_path)):
        assert find_step(path) == (tmp_path / "checkpoints", 7)


def test_paths_may_be_relative_or_in_the_home_folder(tmp_path, monkeypatch):
    state, like = trees(mesh(1))
    small = {"params": {"b": state["params"]["b"]}}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in ("here/run", Path("~/run")):
        saved(path, small, 1)
        directory, step = find_step(path)
        assert directory.is_absolute() and step == 1 and steps(path) == [1]
        found = load(directory, step, params={"b": like["params"]["b"]})
        assert equal(found, small)
    assert (tmp_path / "here/run/1").is_dir() and (tmp_path / "home/run/1").is_dir()


def test_find_step_says_that_there_is_none(one_step, tmp_path):
    assert steps(tmp_path / "none") == steps(tmp_path) == []
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="no checkpoint in"):
            find_step(path)
    with pytest.raises(UserError, match="no checkpoint of step 8"):
        read_meta(one_step, 8)


def test_checkpoints_refuse_a_file_in_the_folders_place(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match="file.*: Not a directory"):
            saved(path, {"params": {"w": np.zeros(3)}}, 1)


def test_checkpoints_refuse_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with small.unprivileged(), pytest.raises(UserError, match="Permission denied"):
        Checkpoints(tmp_path / "run")
