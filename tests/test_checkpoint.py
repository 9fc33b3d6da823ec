"""Checkpoints: moved between devices, compared, saved beside the work."""

import errno
import os
import shutil
import subprocess
import sys
import time

import checkpoints
import jax
import numpy as np
import pytest
import small
from checkpoints import META, equal, mesh, saved, trees

from sit_jax import checkpoint
from sit_jax.checkpoint import (
    Checkpoints,
    Damaged,
    items,
    load,
    read_meta,
    saving,
    steps,
)
from sit_jax.errors import UserError
from sit_jax.experiment import recipe
from sit_jax.parallel.sharding import everywhere
from sit_jax.trainer.start import pack
from sit_jax.training.state import init_state

one_step = checkpoints.one_step


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_eight_devices_save_and_any_number_loads(one_step, devices):
    state, like = trees(mesh(devices))
    found = load(one_step, 7, **like)
    assert equal(found, state)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(
        lambda x: x.sharding, like
    )


def test_one_device_saves_and_eight_load(tmp_path):
    saved(tmp_path, trees(mesh(1))[0], 3)
    state, like = trees(mesh(8))
    found = load(tmp_path, 3, **like)
    assert equal(found, state)
    held = found["params"]["blocks"]["w"].addressable_shards
    assert {shard.data.shape for shard in held} == {(2, 64, 32)}


def test_only_what_is_asked_for_is_read(one_step, tmp_path):
    """Sampling needs the average alone: with the rest gone it still loads."""
    state, like = trees(mesh(1))
    shutil.copytree(one_step, tmp_path / "copy")
    for name in ("params", "opt_state"):
        shutil.rmtree(tmp_path / "copy" / "7" / name)
    found = load(tmp_path / "copy", 7, ema=like["ema"])
    assert list(found) == ["ema"] and equal(found["ema"], state["ema"])
    with pytest.raises(Damaged, match="params/.* is missing"):
        load(tmp_path / "copy", 7, params=like["params"])
    with pytest.raises(UserError, match="has no 'losses'"):
        load(tmp_path / "copy", 7, losses=like["params"])


def test_a_step_holds_these_items(one_step):
    assert items(one_step, 7) == {"params", "ema", "opt_state", "meta"}
    assert read_meta(one_step, 7) == META


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


@pytest.mark.parametrize("devices", [1, 8])
def test_orbax_alone_reads_a_step(one_step, tmp_path, devices):
    """What we do not let it write (its array_metadatas) is not needed."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environ = {**os.environ, "PYTHONPATH": "", "XLA_FLAGS": flags}
    words = [sys.executable, "-c", ALONE, one_step / "7", tmp_path / "x.npz"]
    subprocess.run(words, cwd=tmp_path, env=environ, check=True)
    state, _ = trees(mesh(8))
    with np.load(tmp_path / "x.npz") as found:
        assert equal(
            list(found.values()),
            jax.tree.leaves(state["params"]) + jax.tree.leaves(state["ema"]),
        )


def test_another_architecture_is_refused_with_what_differs(one_step):
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


def test_a_long_list_of_differences_is_cut():
    wanted = {f"w{i}": np.zeros(1) for i in range(30)}
    with pytest.raises(UserError, match=r"missing w0; .*; and 22 more$"):
        checkpoint.compare("here", {}, wanted)


@pytest.mark.parametrize(
    "number, said", [(errno.ENOSPC, "No space left"), (errno.EACCES, "Permission den")]
)
def test_what_fails_in_the_background_is_raised_at_the_next_look(
    tmp_path, monkeypatch, number, said
):
    def fails(_):
        raise OSError(number, os.strerror(number))

    state = {"params": {"w": np.arange(5.0)}}
    saver = Checkpoints(tmp_path, keep_last=1)
    saver.save(1, META, **state)
    saver.wait()
    saver.check()
    monkeypatch.setattr(saving, "write_sums", fails)
    saver.save(2, META, **state)
    with pytest.raises(UserError, match=f"{tmp_path}: {said}"):
        for _ in range(1000):
            saver.check()
            time.sleep(0.01)
    assert steps(tmp_path) == [1]  # keep_last=1, and yet the good one is kept
    checkpoint.require_whole(tmp_path, 1)


def test_saving_compiles_nothing(tmp_path):
    """Slices of what eight devices hold alike were a program each, 7 s of them."""
    whole = jax.device_put(np.ones((8, 37), np.float32), everywhere(mesh(8)))
    state, built = {"params": {"w": whole}}, []
    hear = lambda event, seconds, **more: built.append(event)
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        saved(tmp_path, state, 7)
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
    assert not [event for event in built if event.startswith("/jax/core/compile")]


def test_every_item_that_is_read_has_been_written():
    """The items of a run are named in one place, for saving and for restoring."""
    parts = recipe(small.config())
    state = jax.eval_shape(
        lambda key: init_state(parts.model, parts.tx, parts.shape, key, (0.9, 0.99)),
        jax.random.key(0),
    )
    concrete = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    written, _ = pack(concrete, (0.9, 0.99))
    assert set(written) == {"params", "ema", "ema_0.99", "opt_state"}
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    in_meta = count(state.step) + count(state.skipped)
    assert sum(map(count, written.values())) + in_meta == count(state)
