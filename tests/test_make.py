"""What CI calls ends with an error when a test does."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

LEAKS = """
import gc, subprocess, sys

def test_that_fails_in_the_middle():
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert subprocess.Popen(words, stderr=subprocess.PIPE) is None

def test_in_which_garbage_is_collected():
    sys.last_value = sys.last_traceback = None  # they hold the process
    gc.collect()
"""


@pytest.mark.parametrize("code", [0, 1])
@pytest.mark.parametrize("words", [["make", "test"], [".ci/run"]])
def test_a_failing_suite_is_a_failing_command(tmp_path, words, code):
    """With stand-ins for ruff and python, of which the second is the test runner."""
    for name, ends in (("ruff", 0), ("python", code)):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\nexit {ends}\n")
        program.chmod(0o755)
    # nothing is installed: what the targets need counts as there
    flags = f"BIN={tmp_path} -o .venv/dev -o .venv/installed"
    run = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "MAKEFLAGS": flags}, capture_output=True
    )
    assert (run.returncode != 0) == (code != 0), run.stderr


def test_a_failing_test_fails_no_other(tmp_path):
    (tmp_path / "test_leaks.py").write_text(LEAKS)
    settings = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path]
    words = [sys.executable, "-m", "pytest", "-p", "conftest", *settings, tmp_path]
    run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert "1 failed, 1 passed" in run.stdout, run.stdout
