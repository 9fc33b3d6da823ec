"""Training steps: images/s, MFU, memory, compile time, beside PyTorch's in one run.

python benchmarks/train_step.py --sizes S --batches 8 --reference DIR --json out.json
python benchmarks/train_step.py --kind mdtv2 --masked --in-turn [--reference DIR]

Each row is a process of its own (steps.py). DIR is a clone of SiT (--kind sit), DiT or
fast-DiT (dit) or MDT (mdtv2); of its settings the quickest is what ratios are to.
--adan is a clone of sail-sg/Adan, which MDT trains with; AdamW is in its place. On a
CPU rows can take turns, so that what else runs slows them all. --masked: MDT's plain
and masked pass in one step, over two plain steps. It imports jax, flax, optax, einops
and numpy, and torch for DIR.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
# PyTorch's, without which Linux gives it memory 4 KiB at a time; ours: compile.py.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "THP_MEM_ALLOC_ENABLE": "1"}


def main():
    args = arguments()
    rows = [Row(case) for case in cases(args)]
    if args.in_turn:
        for row in rows:
            row.begin()
        for _ in range(args.rounds):
            for row in rows:
                row.time(args.steps)
        for row in rows:
            row.end()
    else:
        for row in rows:
            row.begin()
            for _ in range(args.rounds):
                row.time(args.steps)
            row.end()
            print(said(row.result(), None), file=sys.stderr, flush=True)
    results = [row.result() for row in rows]
    print(table(results))
    if args.masked:
        print(masked(rows))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kind", default="sit", choices=("sit", "dit", "mdtv2"))
    add("--sizes", default="S", help="of S, B, L, XL, separated by commas, as are all")
    add("--batches", default="8")
    add("--dtypes", default="float32", help="float32, bfloat16")
    add("--remat", default="none", help="none, dots, full, offload")
    add(
        "--attention",
        default="auto",
        help="auto, xla, cudnn, head_by_head, heads_first",
    )
    add("--unroll", default="1")
    add("--width", type=int, help="other than the size's, so that a CPU can hold XL")
    add("--heads", type=int, help="to go with it")
    add("--reference", metavar="DIR", help="a clone of the original")
    add("--adan", metavar="DIR", help="a clone of MDT's optimizer")
    add("--no-compile", action="store_true", help="without torch.compile")
    add("--mask-sizes", type=int, help="numbers of tokens MDT's pass is compiled for")
    add("--masked", action="store_true", help="beside two plain steps")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=1, help="in a round")
    add("--in-turn", action="store_true", help="hold all rows in memory at once")
    add("--json", metavar="FILE")
    args = parser.parse_args()
    if args.reference and (args.width or args.heads):
        parser.error("the originals have four sizes: --reference goes without --width")
    if args.adan and (args.kind != "mdtv2" or not args.reference):
        parser.error("--adan belongs to --kind mdtv2 --reference DIR")
    return args


def cases(args):
    words = lambda text, kind=str: [kind(word) for word in text.split(",")]
    shared = {"kind": args.kind, "fields": {}}
    shared |= {"reference": args.reference, "adan": args.adan}
    for name in ("width", "heads"):
        if getattr(args, name) is not None:
            shared["fields"][name] = getattr(args, name)
    if args.mask_sizes:
        shared["fields"]["sizes"] = args.mask_sizes
    plain = {"fields": shared["fields"] | {"hide": None}}
    for size, batch in itertools.product(words(args.sizes), words(args.batches, int)):
        base = shared | {"size": size, "batch": batch}
        grid = (words(args.dtypes), words(args.remat), words(args.attention))
        for values in itertools.product(*grid, words(args.unroll, int)):
            names = ("dtype", "remat", "attention", "unroll")
            case = base | dict(zip(names, values, strict=True), side="jax")
            yield case
            if args.masked:
                yield case | plain
        if args.reference:
            for each in settings(words(args.dtypes), words(args.remat), args):
                yield base | each
                if args.masked:
                    yield base | each | plain


def settings(dtypes, remat, args):
    """Those of PyTorch: eager and compiled, TF32 beside float32, checkpoints or not."""
    kept = ["none"] + ["full"] * (remat != ["none"])
    for dtype, keep in itertools.product(dtypes, kept):
        for compiled in (False, True)[: 1 if args.no_compile else 2]:
            row = {"side": "torch", "dtype": dtype, "remat": keep, "compile": compiled}
            yield row | {"tf32": dtype == "bfloat16"}
            if dtype == "float32" and not args.in_turn:
                yield row | {"tf32": True}


class Row:
    """A case, its worker, and what that said."""

    def __init__(self, case):
        self.case, self.facts, self.seconds, self.steps = case, {}, [], 1

    def begin(self):
        words = [sys.executable, str(HERE / "steps.py"), json.dumps(self.case)]
        pipe = subprocess.PIPE
        environ = os.environ | (HUGE_PAGES if self.case["side"] == "torch" else {})
        self.worker = subprocess.Popen(
            words, stdin=pipe, stdout=pipe, text=True, env=environ
        )
        self.facts |= self._answer()

    def time(self, steps):
        if "error" in self.facts:
            return
        self.worker.stdin.write(f"{steps}\n")
        self.worker.stdin.flush()
        found, self.steps = self._answer(), steps
        if "seconds" in found:
            self.seconds.append(found.pop("seconds") / steps)
        self.facts |= found

    def end(self):
        self.worker.stdin.close()
        self.worker.wait()

    def result(self):
        row = self.case | self.facts
        if not self.seconds:
            return row
        middle, batch = statistics.median(self.seconds), self.case["batch"]
        low, high = min(self.seconds), max(self.seconds)
        row |= {"step_s": middle, "least_s": low, "most_s": high}
        row["images_per_second"] = batch / middle
        if row.get("peak_tflops"):
            rate = row["images_per_second"] * row["gflop_per_image"] / 1e3
            row["mfu"] = rate / row["peak_tflops"]
        return row

    def _answer(self):
        for line in self.worker.stdout:
            if line.startswith("="):
                return json.loads(line[1:])
        return {"error": f"worker ended with {self.worker.wait()}"}


def table(results):
    names = "batch, images/s, step s (least-most), MFU, peak GB, compile s, ratio"
    lines = ["| | " + " | ".join(names.split(", ")) + " |", "|---" * 8 + "|"]
    return "\n".join(lines + [said(row, best(row, results)) for row in results])


def best(row, results):
    """Images/s of PyTorch's quickest setting of this size, batch and kind of step."""
    alike = lambda r: all(r.get(k) == row.get(k) for k in ("size", "batch", "fields"))
    rates = [r.get("images_per_second", 0) for r in results if r["side"] == "torch"]
    rows = [r for r in results if r["side"] == "torch"]
    return max((x for r, x in zip(rows, rates, strict=True) if alike(r)), default=None)


def said(row, opponent):
    if row["side"] == "torch":
        how = [row["version"].partition("+")[0] if "version" in row else "torch"]
        how += ["compiled" if row["compile"] else "eager", row["dtype"]]
        how += ["TF32"] * (row["tf32"] and row["dtype"] == "float32")
        how += ["checkpoints"] * (row["remat"] == "full")
    else:
        how = [row.get("version", "jax"), row["dtype"], f"remat {row['remat']}"]
        how += [row.get("attention", ""), f"unroll {row['unroll']}"]
    size = f"{row['kind']} {row['size']}/2"
    if "width" in row["fields"]:
        size += f", width {row['fields']['width']}"
    if "hide" in row["fields"]:
        size += ", plain pass"
    name = f"{size}: {' '.join(how)}"
    if "step_s" not in row:
        return f"| {name} | {row['batch']} | {row.get('error', 'no answer')} |"
    mfu = f"{row['mfu']:.3f}" if "mfu" in row else "-"
    ratio = f"{row['images_per_second'] / opponent:.2f}" if opponent else "-"
    spread = f"{row['step_s']:.3f} ({row['least_s']:.3f}-{row['most_s']:.3f})"
    return (
        f"| {name} | {row['batch']} | {row['images_per_second']:.4g} | {spread} | "
        f"{mfu} | {row['peak_gb']:.2f} | {row['compile_s']:.1f} | {ratio} |"
    )


def masked(rows):
    """The step of both passes over two plain steps, and the same in multiply-adds."""
    lines = []
    for both, plain in zip(rows[::2], rows[1::2], strict=True):
        if not (both.seconds and plain.seconds):
            continue
        ratios = [a / (2 * b) for a, b in zip(both.seconds, plain.seconds, strict=True)]
        middle, spread = statistics.median(ratios), (min(ratios), max(ratios))
        line = (
            f"{both.case['side']} {both.case['size']}/2: both passes over two plain "
            f"steps {middle:.3f} ({spread[0]:.3f}-{spread[1]:.3f})"
        )
        if "gflop_per_image" in both.facts:
            work = [row.facts["gflop_per_image"] for row in (both, plain)]
            line += f", of multiply-adds {work[0] / (2 * work[1]):.3f}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
