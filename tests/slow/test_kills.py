"""One run, killed twenty times with kill -9, is the run that never was."""

import time

import numpy as np
from helpers import commands, small

from sit_jax import checkpoint

KILLS, EACH = 20, 30  # so many steps take longer than a save
STEPS = KILLS * EACH + 60
FIELDS = {"steps": STEPS, "save_every": EACH, "keep_last": 4}


def test_twenty_kills_half_of_them_inside_a_save(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv(
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0"
    )  # quick starts
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    commands.ended(commands.start(unbroken, **FIELDS))
    rng, inside = np.random.default_rng(7), []
    for number in range(KILLS):
        process = commands.start(broken, **FIELDS)
        wanted = number * EACH + int(rng.integers(1, EACH + 1))
        in_a_save = number % 2 == 1
        happened = lambda: (
            commands.logged(broken, wanted) and commands.saving(broken, 0) == in_a_save  # noqa: B023
        )
        commands.until(process, happened)
        time.sleep(rng.uniform(0, 0.01))
        commands.kill(process)
        inside.append(commands.saving(broken, 0))
        assert max(small.losses(broken)) < STEPS
    commands.ended(commands.start(broken, **FIELDS))
    assert small.losses(broken) == small.losses(unbroken)
    assert sorted(small.losses(broken)) == list(range(1, STEPS + 1))
    print(f"{sum(inside)} of {KILLS} kills tore a save")
    assert KILLS // 4 <= sum(inside) <= 3 * KILLS // 4
    folder = broken / "checkpoints"
    assert not list(folder.glob("*tmp*")) and not list(folder.glob("*.damaged*"))
    for step in checkpoint.steps(folder):
        checkpoint.require_intact(folder, step)


def test_sigkill_of_a_run_with_workers_leaves_none_behind(tmp_path):
    import psutil

    process = commands.start(tmp_path, steps=100_000, workers=2, save_every=10_000)
    commands.until(process, lambda: commands.logged(tmp_path, 20))
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    commands.kill(process)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
