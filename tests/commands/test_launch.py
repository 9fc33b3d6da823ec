"""The scripts in launch/, with something in the place of the programs they call."""

import os
import re
import shutil
import subprocess
import tomllib

import pytest
from helpers import ROOT
from helpers.small import flags_of

from sit_jax.parallel.multihost import TORCHRUN

GIVEN = ["--config", "configs/sit_xl2.py", "--config.source.path=a b"]
SAYS = """#!/bin/bash
printf '%s\\n' "${0##*/}" "$@" -- >> "$CALLS"
"""


class Machine:
    """A folder with our scripts, where programs only tell how they were called."""

    def __init__(self, folder):
        self.folder, self._told = folder, folder / "calls"
        for name in ("gcloud", "srun", "watch", ".venv/bin/python"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(SAYS)
            (folder / name).chmod(0o755)
        (folder / "sit").symlink_to(".")  # where a host's clone is
        shutil.copytree(ROOT / "launch", folder / "launch")

    def calls(self, *command, **variables):
        """-> the words of each program that a command calls."""
        self._told.unlink(missing_ok=True)
        path = f"{self.folder}:{os.environ['PATH']}"
        env = {"PATH": path, "CALLS": str(self._told), **variables}
        subprocess.run(command, cwd=self.folder, env=env, check=True, timeout=20)
        return [each.splitlines() for each in self._told.read_text().split("--\n")[:-1]]

    def runs(self, script, *words, **variables):
        return self.calls("bash", f"launch/{script}", *words, **variables)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def test_a_pods_hosts_get_a_python_that_jax_takes_and_the_flags_as_given(machine):
    words = ("sit", "zone", "v4-32", "none", *GIVEN)
    create, install, train = machine.runs("tpu_vm.sh", *words, REPO="https://x/y")
    assert create[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "create"]
    version = re.search(r"venv .*--python ([\d.]+) \.venv", install[-1])[1]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    low, high = re.findall(r"[\d.]+", project["requires-python"])
    as_numbers = lambda text: [int(part) for part in text.split(".")]
    assert as_numbers(low) <= as_numbers(version) < as_numbers(high)
    (there,) = machine.calls("bash", "-c", train[-1])
    assert there == ["python", "train.py", "--workdir", "/shared/run", *GIVEN]


def test_a_slice_that_is_there_is_not_created(machine):
    words, env = ("sit", "zone", "v4-32", "none"), {"REPO": "x", "CREATE": "no"}
    install, train = machine.runs("tpu_vm.sh", *words, *GIVEN, **env)
    assert "create" not in install and "train.py" in train[-1]


def test_a_share_is_mounted_on_all_hosts(machine):
    words = ("sit", "zone", "v4-32", "10.0.0.2:/vol1", *GIVEN)
    mount = machine.runs("tpu_vm.sh", *words, REPO="https://x/y")[2]
    assert "--worker all" in " ".join(mount) and "10.0.0.2:/vol1 /shared" in mount[-1]


def test_without_an_address_to_clone_nothing_is_created(machine):
    with pytest.raises(subprocess.CalledProcessError):
        machine.runs("tpu_vm.sh", "sit", "zone", "v4-32", "none")
    assert not (machine.folder / "calls").exists()


def test_slices_are_queued_together(machine):
    one, _ = machine.runs("tpu_queued.sh", "sit", "zone", "v5p-256")
    assert one[one.index("--node-id") + 1] == "sit" and "--spot" not in one
    two, _ = machine.runs(
        "tpu_queued.sh", "sit", "zone", "v5p-256", SLICES="2", SPOT="1"
    )
    assert two[two.index("--node-count") + 1] == "2" and "--spot" in two


def test_slurm_and_flags_hand_on_what_they_are_given(machine):
    (srun,) = machine.runs("slurm.sh", *GIVEN, SLURM_SUBMIT_DIR=str(machine.folder))
    assert srun[-5:] == [".venv/bin/python", "train.py", *GIVEN]
    where = ["--coordinator", "10.0.0.1:8476", "--processes", "2", "--process", "1"]
    (flags,) = machine.runs("flags.sh", *where[1::2], *GIVEN, SCRIPT="sample.py")
    assert flags == ["python", "sample.py", *GIVEN, *where]


def test_torchruns_variables_are_all_set(machine):
    program = machine.folder / ".venv" / "bin" / "python"
    program.write_text('#!/bin/bash\nprintf "%s\\n" "$@" > told; env > "$CALLS"')
    words = ("bash", "launch/torchrun_env.sh", *GIVEN)
    env = {"PATH": os.environ["PATH"], "CALLS": "calls", "MASTER_ADDR": "a", "N": "1"}
    subprocess.run(words, cwd=machine.folder, env=env, check=True, timeout=20)
    lines = (machine.folder / "calls").read_text().splitlines()
    said = dict(line.split("=", 1) for line in lines)
    assert [said[name] for name in TORCHRUN] == ["a", "29500", "2", "1"]
    assert (machine.folder / "told").read_text().splitlines() == ["train.py", *GIVEN]


def test_a_jobs_pods_give_train_flags_that_it_has():
    text = (ROOT / "launch" / "jobset.yaml").read_text()
    flags = re.findall(r"(?<= )(--[a-z-]+) (?!$)", text[text.index("exec python") :])
    assert {"--coordinator", "--processes", "--process"} < set(flags)
    assert set(flags) <= flags_of("train")
