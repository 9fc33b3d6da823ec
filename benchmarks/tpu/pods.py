"""The tables of docs/evidence/tpu.md: programs for TPU slices, compiled on any machine.

python benchmarks/tpu/pods.py [--only v6e] [--json pods.jsonl]; needs libtpu. A row is
read off what a command prints, run in a process of its own: one to four CPU minutes.
What the JSON file holds already is not compiled again, so a run that was ended goes on;
after a change of the program, name another file.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BF16 = "--config.precision.training=bf16"
TRAINING = [
    ("sit_xl2.py", "v5e:4x4", 1024),
    ("sit_xl2.py", "v5e:4x4", 1280),
    ("sit_xl2.py", "v4:4x4x4", 1024),
    ("mdt.py:XL/2+v2", "v4:4x4x4", 1024),
    ("sit_xl2.py", "v5p:4x4x8", 1024),
    ("dit.py", "v5p:4x4x8", 1024),
    ("sit.py:XL/2+512", "v5p:4x4x8", 1024),
    ("dit.py:XL/2+512", "v5p:4x4x8", 1024),
    ("sit_xl2.py", "v6e:16x16", 1024),
    ("dit.py", "v6e:16x16", 1024),
    ("mdt.py", "v6e:16x16", 1024),
    ("mdt.py:XL/2+v2", "v6e:16x16", 1024),
]
SAMPLING = [
    ("sit_xl2.py", "v5e:4x4", 64),
    ("sit_xl2.py", "v5p:4x4x8", 64),
    ("sit.py:XL/2+512", "v5p:4x4x8", 64),
    ("sit_xl2.py", "v6e:16x16", 64),
]
KINDS = "all-gather all-reduce reduce-scatter all-to-all collective-permute".split()
SIZES = re.compile(
    r"compiled in (\d+) s; .*?arguments ([\d.]+), temporaries ([\d.]+), .*free ([\d.]+)"
)
PACE = re.compile(r"reckons ([\d.]+) million cycles, .*?(\d+)% MFU")


def command(script, name, slice_, batch):
    shared = [
        "--plan",
        "--once",
        "--topology",
        slice_,
        "--config",
        f"configs/{name}",
    ]
    if script == "train.py":
        return [script, *shared, BF16, f"--config.batch_size={batch}"]
    return [script, *shared, "--batch-size", str(batch)]


def measure(script, name, slice_, batch):
    """Returns {"command", "network", "cells"} or {.., "failed"} of a program."""
    words = command(script, name, slice_, batch)
    result = {"command": f"python {' '.join(words)}", "network": name}
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True
    )
    sizes = SIZES.search(done.stdout)
    if done.returncode or not sizes:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["?"]
        return result | {"failed": lines[-1]}
    sent = dict(re.findall(r"^([a-z-]+) +\d+ +\d+ +([\d.]+)$", done.stdout, re.M))
    seconds, *memory = sizes.groups()
    gb = [f"{float(size):.2f}" for size in (*memory, *(sent.get(k, 0) for k in KINDS))]
    pace = PACE.search(done.stdout)
    cells = [
        name,
        slice_,
        f"{batch:,}",
        *gb,
        seconds,
        *(pace.groups() if pace else "??"),
    ]
    return result | {"cells": cells}


def make_table(results):
    """Yields a table in Markdown; what does not compile is told in its row."""
    kinds = " | ".join(f"{kind} GB" for kind in KINDS)
    head = (
        "| network | topology | batch | arguments GB | temporaries GB | free GB | "
        f"{kinds} | compiled s | million cycles | MFU % |"
    )
    yield head
    yield "|---" * (head.count("|") - 1) + "|"
    for result in results:
        cells = result.get("cells") or [result["network"], result.get("failed")]
        yield f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose command holds this")
    parser.add_argument("--json", type=Path, default=Path("pods.jsonl"))
    args = parser.parse_args()
    rows = [("train.py", *row) for row in TRAINING]
    rows += [("sample.py", *row) for row in SAMPLING]
    held = args.json.read_text().splitlines() if args.json.exists() else []
    known = {each["command"]: each for each in map(json.loads, held)}
    tables = {"train.py": [], "sample.py": []}
    for row in rows:
        asked = f"python {' '.join(command(*row))}"
        if args.only not in asked:
            continue
        if asked not in known:
            known[asked] = measure(*row)
            with args.json.open("a") as file:
                print(json.dumps(known[asked]), file=file)
        tables[row[0]].append(known[asked])
    for script, results in tables.items():
        if results:
            print(f"\n{script}", *make_table(results), sep="\n", flush=True)


if __name__ == "__main__":
    main()
