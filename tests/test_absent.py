"""What only some tasks need may be absent: everything still imports."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ABSENT = (  # optional, or slow to import: torch is imported inside functions alone
    "torch wandb tensorflow timm diffusers tensorflow_datasets gcsfs peft transformers"
).split()

PROGRAM = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
for name in {modules}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
import jax
print(jax._src.xla_bridge._backends and "importing started the devices" or "")
"""


def modules():
    found = [file.stem for file in ROOT.glob("*.py")]
    for file in sorted((ROOT / "sit_jax").rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found.append(".".join(parts).removesuffix(".__init__"))
    return found


def run(names):
    """What a Python without the absent packages says about importing these."""
    program = PROGRAM.format(absent=ABSENT, modules=names)
    words = [sys.executable, "-W", "error::ImportWarning", "-c", program]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_everything_imports_without_them():
    assert {"train", "sample", "port_weights", "sit_jax.config"} <= set(modules())
    assert run(modules()) == ""


def test_the_absent_are_absent():
    """Or the test above would prove nothing."""
    said = run(["torch.nn", "wandb"])
    assert "No module named 'torch" in said and "wandb" in said
