"""What CI calls ends with an error when a test does."""

import os
import subprocess

import pytest
from conftest import ROOT


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
