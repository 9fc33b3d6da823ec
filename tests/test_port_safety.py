"""port_weights.py runs no code of a file and touches no accelerator."""

import os
import re

import torch
from conftest import ROOT
from small import script


class Runs:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_file_that_would_run_code_ends_in_one_line(tmp_path):
    torch.save({"ema": {"a": torch.ones(2)}, "x": Runs()}, tmp_path / "x.pt")
    ended = script("port_weights.py", tmp_path / "x.pt", tmp_path / "ck")
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert re.search(r"it would run \w+\.mkdir", ended.stderr)
    assert not (ROOT / "ran").exists()
    assert not (tmp_path / "ck").exists()


def test_no_accelerator_is_touched():
    code = "import port_weights, jax; print(jax.config.jax_platforms)"
    without = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    assert script("-c", code, env=without).stdout.strip() == "cpu"
