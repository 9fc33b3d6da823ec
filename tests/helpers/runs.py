"""Runs of tests/helpers/small.py in processes of their own: begun, watched, ended."""

import os
import subprocess
import sys
import time

from conftest import ROOT
from helpers import small

COMMAND = [sys.executable, "train.py", "--config", "tests/helpers/small_config.py"]


def start(workdir, devices=1, **fields):
    """Begins a run; fields: of its config. Eight devices take longer to compile for."""
    set_fields = [f"--config.{name}={value}" for name, value in fields.items()]
    words = [*COMMAND, "--workdir", str(workdir), "--config.preview=0", *set_fields]
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        words,
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that a signal can go to it and its workers alone
    )


def ended(process, code=0, timeout=300):
    """Waits for a run to end with that exit code; -> what it wrote to stderr."""
    _, errors = process.communicate(timeout=timeout)
    assert process.returncode == code, errors.decode()
    return errors.decode()


def kill(process):
    process.kill()
    process.wait()
    process.stderr.close()


def until(process, happened):
    """Waits for a moment; the run must not be over before it comes."""
    while not happened():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.001)


def logged(workdir, step):
    log = workdir / "metrics.jsonl"
    return log.exists() and max(small.losses(workdir), default=0) >= step


def saving(workdir, step):
    """Whether a save of that step or a later one has begun and is not complete."""
    names = [path.name for path in (workdir / "checkpoints").glob("*.orbax-check*tmp*")]
    return any(int(name.split(".")[0]) >= step for name in names)
