"""benchmarks/train_step.py needs no more than a bare accelerator image holds."""

import subprocess
import sys

from helpers import ROOT

IMPORTS = """
import importlib.abc, sys
ABSENT = {"grain", "ml_collections", "tensorboardX", "tensorflow_datasets", "sklearn"}
ABSENT |= {"array_record", "safetensors", "tensorflow", "tqdm", "wandb", "PIL"}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/benchmarks"]
import steps, train_step
import sit_jax.training.step, sit_jax.parallel.hardware
import sit_jax.models.codec, sit_jax.models.flops
for kind in ("sit", "dit", "mdtv2"):
    model, process, tx = steps.parts({"kind": kind, "size": "XL", "remat": "dots"})
    print(type(model).__name__, model.width, model.remat)
"""


def test_the_training_step_is_timed_without_the_packages_for_data_and_logs():
    run = [sys.executable, "-c", IMPORTS, str(ROOT)]
    found = subprocess.run(run, capture_output=True, text=True)
    assert found.stdout.splitlines() == [
        "SiT 1152 dots",
        "DiT 1152 dots",
        "MDTv2 1152 dots",
    ], found.stderr
