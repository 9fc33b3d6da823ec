"""Strict JAX on eight simulated CPU devices, for every test and its subprocesses."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "xla"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
PLACES = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks" / "tpu")]
sys.path[:0] = PLACES
os.environ["PYTHONPATH"] = os.pathsep.join(PLACES)

# a shell starts a job in the background with Ctrl-C ignored, and programs inherit that
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a script's main() in this process; returns exit code, stdout, stderr."""

    def call(script, *words):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            script.main()
        return end.value.code, *capsys.readouterr()

    return call


@pytest.fixture(autouse=True)
def no_process_outlives_its_test(monkeypatch):
    """One that fails in the middle leaves processes, and pipes that nobody closes.

    That is a warning, hence an error, in whatever test the garbage is collected in.
    """
    begun, make = [], subprocess.Popen.__init__

    def remembered(self, *words, **how):
        make(self, *words, **how)
        begun.append(self)

    monkeypatch.setattr(subprocess.Popen, "__init__", remembered)
    yield
    for process in begun:
        if process.poll() is None:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
