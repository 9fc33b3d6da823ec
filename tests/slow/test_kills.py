"""One run, killed twenty times with kill -9, is the run that never was."""

import time

import numpy as np
import runs
import small

from sit_jax import checkpoint

KILLS, EACH = 20, 6
STEPS = KILLS * EACH + 12
FIELDS = {"steps": STEPS, "save_every": 5, "keep_last": 4}


def test_twenty_kills_half_of_them_inside_a_save(tmp_path):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    runs.ended(runs.start(unbroken, **FIELDS))
    rng, inside = np.random.default_rng(7), 0
    for number in range(KILLS):
        process = runs.start(broken, **FIELDS)
        wanted = number * EACH + int(rng.integers(1, EACH + 1))
        if number % 2:
            runs.until(process, lambda: runs.saving(broken, wanted))  # noqa: B023
            time.sleep(rng.uniform(0, 0.01))
        else:
            runs.until(process, lambda: runs.logged(broken, wanted))  # noqa: B023
            time.sleep(rng.uniform(0, 0.05))
        runs.kill(process)
        inside += runs.saving(broken, 0)
        assert max(small.losses(broken)) < STEPS
    runs.ended(runs.start(broken, **FIELDS))
    assert small.losses(broken) == small.losses(unbroken)
    assert sorted(small.losses(broken)) == list(range(1, STEPS + 1))
    assert inside >= KILLS // 4  # so many left a torn save behind
    print(f"{inside} of {KILLS} kills tore a save")
    folder = broken / "checkpoints"
    assert not list(folder.glob("*tmp*")) and not list(folder.glob("*.damaged*"))
    for step in checkpoint.steps(folder):
        checkpoint.require_whole(folder, step)


def test_sigkill_of_a_run_with_workers_leaves_none_behind(tmp_path):
    import psutil

    process = runs.start(tmp_path, steps=100_000, workers=2, save_every=10_000)
    runs.until(process, lambda: runs.logged(tmp_path, 20))
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    runs.kill(process)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
