"""The tables of docs/tpu.md: programs for TPU slices, compiled on any machine.

python benchmarks/pods.py [--only v6e] [--json pods.jsonl]; needs libtpu. A row is the
last line of a command, run in a process of its own: one to four CPU minutes. What the
JSON file holds already is not compiled again, so a run that was ended goes on; after a
change of the program, name another file.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
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


def measured(script, name, slice_, batch):
    """-> {"command", "row", "cycles", "mfu"} or {"command", "failed"} of a program."""
    asked = command(script, name, slice_, batch)
    result = {"command": f"python {' '.join(asked)}", "network": name}
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, *asked], cwd=ROOT, env=env, capture_output=True, text=True
    )
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines or not lines[-1].startswith("|"):
        return result | {"failed": (lines or done.stderr.splitlines() or ["?"])[-1]}
    result |= {"head": lines[-2], "row": lines[-1]}
    if pace := PACE.search(done.stdout):
        result |= {"cycles": float(pace[1]), "mfu": int(pace[2])}
    return result


def table(results):
    """Markdown; a program that does not fit or compile is told in its row."""
    head = next((each["head"] for each in results if "head" in each), "| |")
    yield f"| network {head} million cycles | MFU |"
    yield "|---" * (head.count("|") + 2) + "|"
    for each in results:
        row = each.get("row") or f"| {each['failed']} |"
        cycles, mfu = each.get("cycles", "?"), each.get("mfu", "?")
        yield f"| {each['network']} {row} {cycles} | {mfu} |"


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
            known[asked] = measured(*row)
            with args.json.open("a") as file:
                print(json.dumps(known[asked]), file=file)
        tables[row[0]].append(known[asked])
    for script, results in tables.items():
        if results:
            print(f"\n{script}", *table(results), sep="\n", flush=True)


if __name__ == "__main__":
    main()
