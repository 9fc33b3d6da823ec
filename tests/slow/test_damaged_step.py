"""Two processes of which one host reads a flipped byte in the newest step.

A minute, as root: pytest tests/slow/test_damaged_step.py
"""

import shutil
import subprocess

import pytest
from helpers import processes, small

from sit_jax import checkpoint

# A file is another one for this process alone: a mount in a namespace of its own.
SPOILT = """
import ctypes, subprocess, sys
bad, good, argv = sys.argv[1], sys.argv[2], sys.argv[3:]
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x00020000) == 0, ctypes.get_errno()  # CLONE_NEWNS
subprocess.run(["mount", "--make-rprivate", "/"], check=True)
subprocess.run(["mount", "--bind", bad, good], check=True)
from sit_jax.cli import train
sys.argv = ["train.py", *argv]
train.main()
"""
FIELDS = ("--config.save_every=3", "--config.preview=0")


def run(workdir, steps, bad=None, good=None):
    """Two processes -> exit code, stdout and stderr of each; bad: of the second."""
    words = ["--config", "tests/helpers/small_config.py", "--workdir", workdir, *FIELDS]
    words += [f"--config.steps={steps}", "--coordinator"]
    words += [f"localhost:{processes.free_port()}", "--processes", 2, "--process"]
    script = ["-c", SPOILT, bad, good] if bad else ["train.py"]
    begun = processes.begin(1, "train.py", *words, 0)
    return processes.end(begun + processes.begin(1, *script, *words, 1))


def largest(folder):
    """Its largest file, which holds weights."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return max(files, key=lambda path: path.stat().st_size)


def flipped(path, copy):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    copy.write_bytes(data)
    return copy


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="may not make a namespace of mounts",
)
def test_both_take_the_step_before_and_go_on_as_if_nothing_had_been(tmp_path):
    unbroken, work = tmp_path / "unbroken", tmp_path / "work"
    for workdir, steps in ((unbroken, 9), (work, 6)):
        assert [code for code, *_ in run(workdir, steps)] == [0, 0]
    folder = work / "checkpoints"
    assert checkpoint.steps(folder) == [3, 6]
    good = largest(folder / "6")
    found = run(work, 9, flipped(good, tmp_path / "bad"), good)
    assert [code for code, *_ in found] == [0, 0], found
    told = found[0][1]
    assert "goes on from step 3; WARNING: step 6 is damaged (so process 1 says)" in told
    assert "kept as 6.damaged" in told
    assert checkpoint.steps(folder) == [3, 6, 9]
    assert (folder / "6.damaged").is_dir()
    checkpoint.require_intact(folder, 6)
    assert small.losses(work) == small.losses(unbroken)
    assert list(small.losses(work)) == list(range(1, 10))

    # damage that both see, in the step after
    good = largest(folder / "9")
    shutil.move(flipped(good, tmp_path / "bad"), good)
    found = run(work, 10)
    assert [code for code, *_ in found] == [0, 0], found
    assert "WARNING: step 9 is damaged" in found[0][1] and good.name in found[0][1]
    assert checkpoint.steps(folder) == [6, 9, 10]  # the newest three are kept
