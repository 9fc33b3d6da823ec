"""Everything imports without what only some tasks need, and starts no devices."""

import subprocess
import sys

from helpers import ROOT

# optional, or slow to import: torch is imported inside functions alone
OPTIONAL = "torch wandb tensorflow timm diffusers tensorflow_datasets gcsfs peft"
# what a bare accelerator image lacks, where benchmarks/train_step.py still runs
DATA_AND_LOGS = "grain ml_collections tensorboardX tensorflow_datasets sklearn tqdm"
DATA_AND_LOGS += " array_record safetensors tensorflow wandb PIL"

WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""
IMPORTS = """
import importlib
for name in {names}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
import jax
print(jax._src.xla_bridge._backends and "importing started the devices" or "")
"""
STEPS = """
sys.path.insert(0, "benchmarks")
import steps, train_step
import sit_jax.training.step, sit_jax.parallel.hardware
import sit_jax.models.codec, sit_jax.models.flops
for kind in ("sit", "dit", "mdtv2"):
    model, process, tx = steps.parts({"kind": kind, "size": "XL", "remat": "dots"})
    print(type(model).__name__, model.width, model.remat)
"""


def run_without(absent, program):
    """Returns what a program prints in a Python without these packages."""
    program = WITHOUT.format(absent=absent.split()) + program
    words = [sys.executable, "-W", "error::ImportWarning", "-c", program]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_everything_imports_without_optional_packages():
    names = [file.stem for file in ROOT.glob("*.py")]
    for file in sorted((ROOT / "sit_jax").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        names.append(".".join(parts).removesuffix(".__init__"))
    assert {"train", "sample", "port_weights", "sit_jax.config"} <= set(names)
    # the one that is absent, or this would prove nothing
    lines = run_without(OPTIONAL, IMPORTS.format(names=["torch.nn", *names]))
    assert lines == "torch.nn No module named 'torch'"


def test_training_step_is_timed_without_the_packages_for_data_and_logs():
    lines = run_without(DATA_AND_LOGS, STEPS).splitlines()
    assert lines == ["SiT 1152 dots", "DiT 1152 dots", "MDTv2 1152 dots"]
