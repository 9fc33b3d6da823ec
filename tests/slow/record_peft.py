"""Makes tests/golden/lora with the real peft: python tests/slow/record_peft.py

Two adapters of the recorded network sit_a, as tests/plain_torch has it in torch: one
with ranks and alphas that differ between layers, and one with lengths (DoRA), each
with what peft's module gives for two inputs.
"""

import hashlib
import json
import shutil
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "plain_torch")]

GOLDEN = ROOT / "tests" / "golden"
SIZES = dict(input_size=8, hidden_size=40, depth=2, num_heads=4, num_classes=10)
CASES = {
    "lora": dict(
        r=2,
        lora_alpha=3,
        target_modules=r"blocks\.\d+\.(attn\.qkv|mlp\.fc2)|y_embedder\.embedding_table",
        rank_pattern={r"blocks\.1\.mlp\.fc2": 1},
        alpha_pattern={r"blocks\.0\.attn\.qkv": 1.0},
    ),
    "dora": dict(
        r=1,
        lora_alpha=2,
        use_dora=True,
        use_rslora=True,
        target_modules=["attn.proj", "adaLN_modulation.1"],
    ),
}


def base():
    """The torch module with sit_a's weights."""
    from models import SiT

    network = SiT(**SIZES)
    network.load_state_dict(
        torch.load(GOLDEN / "weights" / "sit_a.pt", weights_only=True), strict=True
    )
    return network.eval()


def inputs():
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 4, 8, 8), np.float32)
    t, y = np.array([0.3, 0.9], np.float32), np.array([3, 10])
    return tuple(map(torch.from_numpy, (x, t, y)))


def adapted(settings, seed=0):
    """A peft module whose every adapter weight is random."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    network = get_peft_model(base(), LoraConfig(**settings))
    for name, weight in network.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            torch.nn.init.normal_(weight, std=0.3)
        elif "lora_" in name:
            weight.data *= 1 + 0.2 * torch.randn_like(weight)
    return network.eval()


def main():
    folder = GOLDEN / "lora"
    shutil.rmtree(folder, ignore_errors=True)
    arrays = dict(zip(("x", "t", "y"), (a.numpy() for a in inputs()), strict=True))
    for name, settings in CASES.items():
        network = adapted(settings)
        network.save_pretrained(folder / name)
        (folder / name / "README.md").unlink()
        with torch.no_grad():
            arrays[name] = network(*inputs()).numpy()
    np.savez_compressed(folder / "outputs.npz", **arrays)
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    record = {
        "made by": "tests/slow/record_peft.py",
        "versions": {n: metadata.version(n) for n in ("peft", "torch", "numpy")},
        "base": "weights/sit_a.pt in tests/plain_torch/models.py",
        "settings": {name: settings for name, settings in CASES.items()},
        "arrays": "NCHW inputs x, t, y; outputs by the name of the adapter",
        "sha256": {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in files
        },
    }
    (folder / "manifest.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
