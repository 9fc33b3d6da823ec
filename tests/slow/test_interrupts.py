"""Ctrl-C in sample.py at random moments: a line within 5 seconds, and it goes on."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import small
from conftest import ROOT


def start(weights, out, cache):
    # nothing compiled before, so that most moments fall into XLA's compiler
    env = {**os.environ, "XLA_FLAGS": "", "JAX_COMPILATION_CACHE_DIR": str(cache)}
    words = [sys.executable, "sample.py", "--weights", weights, "--out", out]
    words += ["--num", "4000", "--batch-size", "8", "--sampler", "dopri8"]
    words = list(map(str, words))
    return subprocess.Popen(words, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("seed", range(3))
def test_ctrl_c_ends_within_five_seconds(tmp_path, seed):
    weights = small.checkpoint(tmp_path / "weights", small.config())
    process = start(weights, tmp_path / "x.npz", tmp_path / "cache")
    time.sleep(4 + 10 * random.Random(seed).random())  # after the imports
    assert process.poll() is None, process.stderr.read()
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    seconds = time.monotonic() - begun
    print(f"{seconds:.1f} s, {len(list((tmp_path / 'x.npz.parts').glob('*')))} parts")
    assert process.returncode == 130 and seconds < 5, said
    assert said.splitlines()[-1] == (
        "sample.py: interrupted; the same command goes on, or begins again"
    )
    assert not (tmp_path / "x.npz").exists()
