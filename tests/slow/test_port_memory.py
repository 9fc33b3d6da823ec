"""XL/2, 2.7 GB, converts with at most 1.5 times its size in memory, both ways.

Takes 11 GB of disk and some minutes: pytest tests/slow/test_port_memory.py -s
"""

import os
import subprocess
import sys

from conftest import ROOT

MAKE = """
import sys, torch
from sit_jax.models.dit import SiT
from sit_jax.released import Released
released = Released(SiT(), (32, 32, 4))
state = {name: torch.from_numpy(x) for name, x in released.constants.items()}
state |= {name: torch.randn(shape) for name, shape in released.trained.items()}
torch.save(state, sys.argv[1])
"""


def peak(*words):
    """Runs python in a process of its own; -> its most resident memory in bytes."""
    os.environ["PYTHONPATH"] = str(ROOT)
    process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


def test_xl_converts_in_one_and_a_half_times_its_size(tmp_path):
    source, directory, back = (tmp_path / n for n in ("xl.pt", "xl", "back.pt"))
    peak("-c", MAKE, source)  # not here: a process counts what its parent had held
    size = source.stat().st_size
    script = ROOT / "port_weights.py"
    there = peak(script, source, directory, "--family", "sit")
    source.unlink()
    again = peak(script, directory, back)
    print(f"{size / 1e9:.2f} GB: {there / size:.2f} and {again / size:.2f} times it")
    assert there < 1.5 * size
    assert again < 1.5 * size
