"""What is known of A and B, held against each other, as Markdown and as JSON."""

import dataclasses
import json
from pathlib import Path

from sit_jax import bundle as bundles
from sit_jax import ladder, outputs
from sit_jax.causes import causes
from sit_jax.drafts import draft
from sit_jax.effects import BY_NAME, manifest_differences
from sit_jax.errors import UserError
from sit_jax.evaluated import Side, open_side
from sit_jax.models.inception_layers import POOL
from sit_jax.pictures import save_png, sheet
from sit_jax.places import local
from sit_jax.workdir import read_json, write_json

NAMES = ("report.json", "report.md", "worst_pairs.png")
SILENT = (".npy", ".png")  # outputs of which only the manifest is read


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Of one side, what there is: a Bundle, a manifest, images or features."""

    path: Path
    bundle: bundles.Bundle | None
    manifest: dict | None
    samples: Side | None


def open_evidence(path, width=POOL):
    """-> Evidence of a bundle, or of samples with a manifest or bundle beside them.

    width: as of evaluated.open_side.
    """
    path = local(path)
    if bundles.is_bundle(path):
        found = bundles.read(path)
        samples = open_side(found.features) if found.features else None
        return Evidence(path, found, found.record["manifest"], samples)
    if not path.exists():
        raise UserError(f"nothing at {path}")
    record = outputs.manifest_path(path)
    inside = path / "bundle" if path.is_dir() else path.with_name(f"{path.name}.bundle")
    found = bundles.read(inside) if inside.is_dir() else None
    manifest = read_json(record) if record.is_file() else None
    if manifest is None and found is not None:
        manifest = found.record["manifest"]
    silent = path.suffix in SILENT or not record.is_file() and found and path.is_dir()
    if silent and manifest is None:
        raise UserError(f"{path} has no manifest {record.name} beside it")
    return Evidence(
        path, found, manifest, None if silent else open_side(path, width=width)
    )


def are_pairs(a, b):
    """Whether image i of both began from the same noise and label, by the manifests."""
    if None in (a.manifest, b.manifest):
        return False
    jobs = [each.manifest.get("job", {}) for each in (a, b)]
    start = [
        (j.get("seed"), j.get("noise"), j.get("labels"), e.manifest.get("noise_sha256"))
        for j, e in zip(jobs, (a, b), strict=True)
    ]
    return start[0] == start[1]


def diagnose(a, b, gap=None, swaps=(), worst=()):
    """Two Evidences, a paired.Gap and rows of swaps -> the report, a dict for JSON."""
    both = None
    rungs, found, rows = [], [], []
    if None not in (a.bundle, b.bundle):
        both = (a.bundle, b.bundle)
        bundles.require_same_network(*both)
        rungs = ladder.climb(*both)
    if None not in (a.manifest, b.manifest):
        rows = manifest_differences(a.manifest, b.manifest)
        found = causes((a.manifest, b.manifest), both, rungs)
    return {
        "a": str(a.path),
        "b": str(b.path),
        "verdict": verdict(
            found, gap, a.manifest is not None and b.manifest is not None
        ),
        "causes": [dataclasses.asdict(cause) for cause in found],
        "manifest": [
            {
                "field": n,
                "a": x,
                "b": y,
                "cause": e.name,
                "fid": e.fid,
                "source": e.source,
            }
            for e, n, x, y in rows
        ],
        "probes": [_probe(each) for each in (a, b)],
        "weights": _weights(both),
        "ladder": [
            {**dataclasses.asdict(r), "outside": r.outside, "inexact": r.inexact}
            for r in rungs
        ],
        "first": ladder.sentence(rungs) if rungs else None,
        "solver": [_solver(each) for each in (a, b)],
        "paired": None if gap is None else _gap(gap),
        "swaps": [{"after": n, "fid": f, "step": s} for n, f, s in swaps],
        "worst": [{"image": i, "rms": size} for i, size in worst],
    }


def verdict(found, gap, known=True):
    """One or two sentences, the likeliest cause first."""
    real = [c for c in found if not c.contradicted]
    real = [c for c in real if c.fid > BY_NAME["batch coupling"].fid]
    told = "Nothing differs that is known to move FID."
    if real:
        told = f"Likeliest cause: {real[0].headline}."
    elif not known:
        told = "Without two manifests the cause cannot be told."
    if len(real) > 1:
        told += f" Then: {', '.join(c.name for c in real[1:])}."
    only_noise = real and {c.name for c in real} == {"noise"}
    if gap is None and only_noise:
        return (
            "Within noise: only the noise differs, which alone moves FID by about "
            f"{real[0].fid:g} near 2. {told}"
        )
    return told if gap is None else f"{gap.sentence()} {told}"


def save(out, report, tiles=None):
    """Writes the folder `out` with report.md, report.json and a picture."""
    with draft(out) as folder:
        folder.mkdir()
        if tiles is not None:
            save_png(folder / NAMES[2], sheet(tiles, 3))
        (folder / NAMES[1]).write_text(markdown(report, tiles is not None))
        write_json(folder / NAMES[0], report)


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
        parts.append(f"## Worst pairs: A, B, stretched difference\n\n![]({NAMES[2]})")
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


def _probe(evidence):
    if evidence.bundle is not None:
        found = evidence.bundle.record["precision"]
    else:
        found = (evidence.manifest or {}).get("precision")
    if not isinstance(found, dict):
        return None
    names = ("default dot", "model dot", "convolution", "line")
    return {name: found.get(name) for name in names}


def _weights(both):
    if both is None:
        return None
    one, other = (each.record["weights"] for each in both)
    names = sorted(one.keys() | other.keys())
    odd = [name for name in names if one.get(name) != other.get(name)]
    return {"tensors": len(names), "differ": odd}


def _solver(evidence):
    found = {}
    if evidence.manifest and "stats" in evidence.manifest:
        found["samples"] = evidence.manifest["stats"]
    if evidence.bundle is not None:
        found["fixed grid"] = evidence.bundle.record["solver"]
    return found


def _gap(gap):
    values = dataclasses.asdict(gap)
    return {**values, "gap": gap.gap, "within_noise": gap.within_noise}
