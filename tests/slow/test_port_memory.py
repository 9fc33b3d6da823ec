"""XL/2, 2.7 GB, converts with at most 1.5 times its size in memory, both ways.

Takes 11 GB of disk and some minutes: pytest tests/slow/test_port_memory.py -s
"""

import os
import subprocess
import sys

from helpers import ROOT

MAKE = """
import sys, torch
from sit_jax.models.dit import SiT
from sit_jax.convert.state_dict import StateDictSpec
spec = StateDictSpec(SiT(), (32, 32, 4))
state = {name: torch.from_numpy(x) for name, x in spec.constants.items()}
state |= {name: torch.randn(shape) for name, shape in spec.trained.items()}
torch.save(state, sys.argv[1])
"""


# a process counts what the one that began it had held, which must be a small one
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen([sys.executable, *sys.argv[1:]], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
print(usage.ru_maxrss)
os._exit(os.waitstatus_to_exitcode(status))
"""


def peak(*words):
    """Runs python in a process of its own; -> its most resident memory in bytes."""
    found = subprocess.run(
        [sys.executable, "-uc", MEASURE, *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
    )
    return int(found.stdout) * 1024


def test_xl_converts_in_one_and_a_half_times_its_size(tmp_path):
    source, directory, back = (tmp_path / n for n in ("xl.pt", "xl", "back.pt"))
    peak("-c", MAKE, source)
    size = source.stat().st_size
    script = ROOT / "port_weights.py"
    there = peak(script, source, directory, "--family", "sit")
    source.unlink()
    again = peak(script, directory, back)
    print(f"{size / 1e9:.2f} GB: {there / size:.2f} and {again / size:.2f} times it")
    assert there < 1.5 * size
    assert again < 1.5 * size
