"""A diagnosis as one page of Markdown, for readers who were not there."""

import json
from pathlib import Path

from sit_jax.diagnosis.effects import BY_NAME

PICTURE = "worst_pairs.png"
CAUSE = ("cause", "FID it may move, near 2", "evidence", "known from")
MANIFEST = ("setting", "A", "B", "belongs to")
PROBE = ("side", "default dot", "model's dot", "convolution", "said at the start")
LADDER = ("stage", "relative L2", "max-abs / rms", "cosine", "band", "")
SWAPS = ("after taking B's", "FID", "step", "share of the way")
WORST = ("image", "rms of the difference, levels")
LEGEND = {  # what a table means, in a sentence or two
    "Causes, the likeliest first": "What differs and is known to move FID. The numbers "
    "order the list, they predict nothing. One that the stages contradict comes last.",
    "Precision measured": "Bits of mantissa that each device kept of what it "
    "multiplied: 24 is float32, 11 TF32, 8 bfloat16.",
    "Stages": "The same inputs through both sides, from noise to figures. Band: what "
    "the declared precisions allow. **outside**: more than that, look there first; "
    "inexact: allowed, but float32 on both sides would not differ so much. Of bytes "
    "the first column is the share that differ, the second the most levels.",
    "Swaps, from A to B": "A's pictures with one component after the other taken from "
    "B. The steps add up to B's FID less A's, and say what comes from where.",
}


def markdown(report, pictured=False):
    """-> the report as one page."""
    a, b = (Path(report[side]).name for side in "ab")
    parts = [
        f"# Why {a} (A) and {b} (B) differ",
        f"**{report['verdict']}**",
        f"**{report['first']}**" if report["first"] else "",
        _table("Causes, the likeliest first", report["causes"], _cause_row, CAUSE),
        _statistics(report["paired"]),
        _table("Swaps, from A to B", report["swaps"], _swap_row, SWAPS),
        _table("Stages", report["ladder"], _rung_row, LADDER),
        _weights(report["weights"]),
        _probes(report["probes"]),
        _solvers(report["solver"]),
        _table("Settings that differ", report["manifest"], _manifest_row, MANIFEST),
    ]
    if pictured:
        parts.append(
            "## Worst pairs\n\nA, B and their difference, stretched to be seen.\n\n"
            f"![A, B and the difference]({PICTURE})"
        )
        parts.append(_table("Their numbers", report["worst"], _values, WORST))
    parts.append(f"A is {report['a']}, B is {report['b']}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(title, rows, row, heads):
    lines = [" | ".join(str(x).replace("|", "/") for x in row(each)) for each in rows]
    if not lines:
        return ""
    head = [" | ".join(heads), "|".join("-" for _ in heads)]
    said = f"{LEGEND[title]}\n\n" if title in LEGEND else ""
    return f"## {title}\n\n{said}" + "\n".join(f"| {line} |" for line in head + lines)


def _cause_row(cause):
    said = cause["said"] or [f"{n}: {x}, {y}" for n, x, y in cause["facts"][:4]]
    name = cause["name"]
    if cause["contradicted"]:
        name += " (the stages contradict it)"
    effect = BY_NAME.get(cause["name"])
    size = f"{effect.fid:g}" if effect else "unknown"
    return name, size, "; ".join(said), effect.source if effect else ""


def _manifest_row(row):
    return row["field"], row["a"], row["b"], row["cause"]


def _rung_row(rung):
    mark = "**outside**" if rung["outside"] else "inexact" if rung["inexact"] else ""
    numbers = (f"{rung[n]:.3g}" for n in ("relative", "peak"))
    return rung["stage"], *numbers, f"{rung['cosine']:.6f}", f"{rung['band']:.2g}", mark


def _swap_row(row):
    return (
        row["after"],
        f"{row['fid']:.6g}",
        f"{row['step']:+.4g}",
        f"{row['share']:.0%}",
    )


def _values(row):
    return [f"{v:.6g}" if isinstance(v, float) else v for v in row.values()]


def _statistics(paired):
    """What is known of the gap of the two FIDs."""
    if not paired:
        return ""
    (a, b), interval = paired["fids"], paired["interval"]
    rows = [
        ("FID of A to the reference", f"{a:.6g}"),
        ("FID of B to the reference", f"{b:.6g}"),
        ("gap, A less B", f"{paired['gap']:+.4g}"),
    ]
    if paired["net"] != paired["gap"]:
        rows.append(("the same at equal numbers of images", f"{paired['net']:+.4g}"))
    if paired["band"] is not None:
        how = "classes as they are" if paired["classes"] else "classes drawn too"
        rows += [
            (f"noise: its standard deviation over seeds ({how})",
             f"{paired['noise']:.3g}"),
            ("noise band: exceeded by one in 10,000 pairs of seeds",
             f"{paired['band']:.3g}"),
            ("chance of such a gap by seeds alone", f"{paired['chance']:.2g}"),
        ]  # fmt: skip
    if paired["scatter"] is not None:
        name = f"standard deviation of {paired['seeds']} other seeds' FIDs"
        rows.append((name, f"{paired['scatter']:.3g}"))
    if interval:
        low, high = interval
        rows.append(("95 % of the gap over pairs", f"{low:+.4g}, {high:+.4g}"))
    rows.append(("FID between A and B", f"{paired['between']:.4g}"))
    if paired["feature_gap"] is not None:
        name = "distance of a pair's features, mean over their rms"
        rows.append((name, f"{paired['feature_gap']:.3g}"))
    return _table("Statistics", rows, lambda row: row, ("", "value"))


def _weights(weights):
    if not weights:
        return ""
    names = ", ".join(weights["differ"][:20])
    names += ", ..." if len(weights["differ"]) > 20 else ""
    count = f"{len(weights['differ'])} of {weights['tensors']} tensors differ"
    return f"## Weights\n\n{count}{': ' if names else '.'}{names}"


def _probes(probes):
    rows = [(n, *_values(p)) for n, p in zip("AB", probes, strict=True) if p]
    return _table("Precision measured", rows, lambda row: row, PROBE)


def _solvers(solvers):
    if not any(solvers):
        return ""
    lines = [f"* {n}: {json.dumps(s)}" for n, s in zip("AB", solvers, strict=True)]
    return "## Solver\n\n" + "\n".join(lines)
