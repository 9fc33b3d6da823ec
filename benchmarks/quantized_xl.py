"""SiT-XL/2 in eight and four bits: bytes, peak memory, seconds, error of the output.

python benchmarks/quantized_xl.py --folder DIR [--forms w8,w4] [--json FILE]

Random float32 weights, nowhere zero, go into DIR (2.7 GB, removed at the end unless
--keep); then quantize.py and sample.py run as a user runs them, each as a process of
its own whose most resident memory is its peak. One Euler step is one evaluation of the
network: what it adds to the noise is the output that is compared. Five minutes.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
MAKE = """
import sys, jax, numpy as np
from functools import partial
from sit_jax.recipes import sit
from sit_jax import checkpoint
from sit_jax.config import to_json
from sit_jax.experiment import build_experiment
from sit_jax.training.state import init_params
parts, rng = build_experiment(sit()), np.random.default_rng(0)
like = jax.eval_shape(partial(init_params, parts.model, parts.shape), jax.random.key(0))
def draw(path, leaf):
    width = leaf.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.02
    return width * rng.standard_normal(leaf.shape, np.float32)
params = jax.tree_util.tree_map_with_path(draw, like)
meta = {"config": to_json(sit()), "step": 0}
checkpoint.save_step(sys.argv[1], 0, meta, ema=params)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, metavar="DIR")
    parser.add_argument("--forms", default="w8,w4", metavar="A,B")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--keep", action="store_true", help="the files in DIR")
    args = parser.parse_args()
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    floats = folder / "float32"
    if not floats.exists():
        ran("-c", MAKE, floats)
    rows, noise = {}, folder / "noise.npy"
    row, reference = evaluated(floats, noise)
    rows["float32"] = {"bytes": size(floats), **row}
    print(said("float32", rows["float32"]), flush=True)
    for form in args.forms.split(","):
        target = folder / form
        words = ("quantize.py", floats, target, "--form", form, "--overwrite")
        seconds, peak = ran(*words)
        row, output = evaluated(target, noise)
        off = np.linalg.norm(output - reference) / np.linalg.norm(reference)
        made = {"made_seconds": seconds, "made_peak_gb": peak}
        rows[form] = {
            "bytes": size(target),
            **made,
            **row,
            "relative_error": float(off),
        }
        print(said(form, rows[form]), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1))
    if not args.keep:
        shutil.rmtree(folder)


def evaluated(weights, noise):
    """Returns seconds and peak memory of sample.py, and the network's output."""
    out = weights.with_suffix(".npy")
    words = ["sample.py", "--weights", weights, "--labels", "207", "--guidance", "1"]
    words += ["--sampler", "euler", "--steps", "1", "--out", out, "--overwrite"]
    start = ["--noise" if noise.exists() else "--save-noise", noise]
    seconds, peak = ran(*words, *start)
    row = {"sample_seconds": seconds, "sample_peak_gb": peak}
    return row, np.load(out) - np.load(noise)


def ran(*words):
    """Runs python in a process of its own; -> seconds, most resident memory in GB."""
    begun, where = time.perf_counter(), {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *map(str, words)]
    process = subprocess.Popen(words, cwd=ROOT, env=where, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{words[1]} ended with {process.returncode}")
    return time.perf_counter() - begun, usage.ru_maxrss * 1024 / 1e9


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def said(name, row):
    return "  ".join([f"{name:8}", *(f"{k} {v:.4g}" for k, v in row.items())])


if __name__ == "__main__":
    main()
