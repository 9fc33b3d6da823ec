"""A diagnosis as one page of Markdown, for readers who were not there."""

import json

from sit_jax.effects import BY_NAME

PICTURE = "worst_pairs.png"


def markdown(report, pictured=False):
    """-> the report as one page."""
    parts = [
        f"# {report['a']} and {report['b']}",
        f"**{report['verdict']}**",
        _table("Causes, the likeliest first", report["causes"], _cause_row, CAUSE),
        _table("Manifests", report["manifest"], _manifest_row, MANIFEST),
        _table("Precision measured", filter(None, report["probes"]), _values, PROBE),
    ]
    if report["weights"]:
        one = report["weights"]
        names = ", ".join(one["differ"][:20]) or "none"
        said = f"{len(one['differ'])} of {one['tensors']} tensors differ: {names}"
        parts.append(f"## Weights\n\n{said}")
    parts.append(_table("Stages", report["ladder"], _rung_row, LADDER))
    if report["first"]:
        parts.append(f"**{report['first']}**")
    if any(report["solver"]):
        lines = [
            f"* {n}: {json.dumps(s)}"
            for n, s in zip("AB", report["solver"], strict=True)
        ]
        parts.append("## Solver\n\n" + "\n".join(lines))
    if report["paired"]:
        lines = [f"* {name}: {value}" for name, value in report["paired"].items()]
        parts.append("## Statistics\n\n" + "\n".join(lines))
    parts.append(_table("Swaps, from A to B", report["swaps"], _values, SWAPS))
    if pictured:
        parts.append(f"## Worst pairs: A, B, stretched difference\n\n![]({PICTURE})")
        parts.append(_table("Their numbers", report["worst"], _values, WORST))
    return "\n\n".join(part for part in parts if part) + "\n"


CAUSE = ("cause", "FID near 2", "evidence", "source")
MANIFEST = ("field", "A", "B", "FID near 2", "belongs to")
PROBE = ("default dot", "model dot", "convolution", "said")
LADDER = ("stage", "relative L2", "max-abs / rms", "cosine", "band", "")
SWAPS = ("after taking B's", "FID", "step")
WORST = ("image", "rms of the difference")


def _table(title, rows, row, heads):
    lines = [" | ".join(str(x).replace("|", "/") for x in row(each)) for each in rows]
    if not lines:
        return ""
    head = [" | ".join(heads), "|".join("-" for _ in heads)]
    return f"## {title}\n\n" + "\n".join(f"| {line} |" for line in head + lines)


def _cause_row(cause):
    said = cause["said"] or [f"{n}: {x}, {y}" for n, x, y in cause["facts"][:4]]
    name = cause["name"]
    if cause["contradicted"]:
        name += " (the stages contradict it)"
    effect = BY_NAME.get(name.partition(" (")[0])
    return name, f"{cause['fid']:g}", "; ".join(said), effect.source if effect else ""


def _manifest_row(row):
    return row["field"], row["a"], row["b"], f"{row['fid']:g}", row["cause"]


def _rung_row(rung):
    mark = "**outside**" if rung["outside"] else "inexact" if rung["inexact"] else ""
    numbers = (f"{rung[n]:.3g}" for n in ("relative", "peak"))
    return rung["stage"], *numbers, f"{rung['cosine']:.6f}", f"{rung['band']:.2g}", mark


def _values(row):
    return [f"{v:.6g}" if isinstance(v, float) else v for v in row.values()]
