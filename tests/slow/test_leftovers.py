"""What a run leaves in memory and behind itself: nothing that grows, nothing at all."""

import os
import signal
import time
from pathlib import Path

import psutil
from helpers import commands, small

from sit_jax import checkpoint


def resident(process):
    return psutil.Process(process.pid).memory_info().rss / 1e6


def test_memory_does_not_grow_over_2000_steps(tmp_path):
    """Resident MB at every 200th step from the 400th on; saves and logs included."""
    process = commands.start(tmp_path, steps=2_600, save_every=100, log_every=10)
    found = []
    for step in range(400, 2_401, 200):
        commands.until(process, lambda: commands.logged(tmp_path, step))  # noqa: B023
        found.append(resident(process))
    commands.ended(process)
    print("resident MB:", ", ".join(f"{size:.0f}" for size in found))
    # a leak of one 4x4 batch a step would be 1 MB, of the state 250 MB; allocators
    # move by a few MB between two looks
    assert found[-1] - found[0] < 25
    assert found[-1] - found[len(found) // 2] < 12


def test_ctrl_c_leaves_no_process_no_shared_memory_no_file(tmp_path, monkeypatch):
    temporary, shared = tmp_path / "tmp", Path("/dev/shm")
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    before = set(shared.iterdir())
    work = tmp_path / "work"
    process = commands.start(
        work, steps=100_000, workers=2, save_every=400, log_every=10
    )
    commands.until(process, lambda: commands.logged(work, 1_000))
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    commands.ended(process)
    print(f"ended {time.monotonic() - begun:.1f} s after Ctrl-C")
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    mine = {path for path in set(shared.iterdir()) - before if path.exists()}
    assert not mine and not list(temporary.iterdir())
    last = max(small.losses(work))
    newest = checkpoint.steps(work / "checkpoints")[-1]
    assert newest >= last >= 1_000
    assert not list((work / "checkpoints").glob("*tmp*"))
