"""What is known of A and B, held against each other, as Markdown and as JSON."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from sit_jax.diagnosis import bundle as bundles
from sit_jax.diagnosis import ladder
from sit_jax.diagnosis.causes import BY_NAME, causes, manifest_differences
from sit_jax.errors import UserError
from sit_jax.evaluation.image_sets import EvaluationInput, open_input
from sit_jax.files import atomic_write, local_path, read_json, write_json
from sit_jax.models.inception import POOL
from sit_jax.sampling import outputs
from sit_jax.sampling.grid import image_grid, save_png

PICTURE = "worst_pairs.png"
NAMES = ("report.json", "report.md", PICTURE)
SILENT = (".npy", ".png")  # outputs of which only the manifest is read


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Of one side, what there is: a Bundle, a manifest, images or features."""

    path: Path
    bundle: bundles.Bundle | None
    manifest: dict | None
    samples: EvaluationInput | None


def open_evidence(path, width=POOL):
    """-> Evidence of a bundle, or of samples with a manifest or bundle beside them.

    width: as of evaluated.open_input.
    """
    path = local_path(path)
    if bundles.is_bundle(path):
        found = bundles.read(path)
        samples = open_input(found.features) if found.features else None
        return Evidence(path, found, found.record["manifest"], samples)
    if not path.exists():
        raise UserError(
            f"nothing at {path}; name samples, or a bundle, which diagnose.py "
            "--collect makes"
        )
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
        path, found, manifest, None if silent else open_input(path, width=width)
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


def labels_of(a, b):
    """The labels of both sides' images, int [N] and [M], or None."""
    found = [(each.manifest or {}).get("job", {}).get("labels") for each in (a, b)]
    if not all(isinstance(each, list) for each in found):
        return None
    return tuple(np.asarray(each, int) for each in found)


def diagnose(a, b, gap=None, swaps=(), worst=(), reference=None):
    """Two Evidences, a paired.Gap and rows of swaps -> the report, a dict for JSON.

    reference: a Gaussian for the last rung, the FID.
    """
    bundled = None not in (a.bundle, b.bundle)
    known = None not in (a.manifest, b.manifest)
    both = (a.bundle, b.bundle) if bundled else None
    rungs = _rungs(both, reference) if bundled else []
    manifests = _manifests(a, b) if known else None
    found = causes(manifests, both, rungs) if known else []
    rows = manifest_differences(*manifests) if known else []
    return {
        "a": str(a.path),
        "b": str(b.path),
        "verdict": verdict(found, gap, known, swaps),
        "causes": [dataclasses.asdict(cause) for cause in found],
        "manifest": [_fact(*row) for row in rows],
        "probes": [_probe(each) for each in (a, b)],
        "weights": _weights(both),
        "ladder": [
            {**dataclasses.asdict(r), "outside": r.outside, "inexact": r.inexact}
            for r in rungs
        ],
        "first": ladder.sentence(rungs) if rungs else None,
        "solver": [_solver(each) for each in (a, b)],
        "paired": None if gap is None else _gap(gap),
        "swaps": _swaps(swaps),
        "worst": [{"image": i, "rms": size} for i, size in worst],
    }


def _rungs(both, reference):
    bundles.require_same_network(*both)
    rungs = ladder.climb(*both)
    return rungs + ladder.figures(*both, rungs, reference)


def _fact(effect, field, a, b):
    """A setting that differs, as the report has it."""
    cause = {"cause": effect.name, "fid": effect.fid, "source": effect.source}
    return {"field": field, "a": a, "b": b, **cause}


def _manifests(a, b):
    """Manifests, with what made the features where both bundles have any."""
    made = [e.bundle and e.bundle.record.get(bundles.MAYBE) for e in (a, b)]
    if not all(made):
        return [a.manifest, b.manifest]
    return [
        each.manifest | {bundles.MAYBE: one}
        for each, one in zip((a, b), made, strict=True)
    ]


def verdict(found, gap, known=True, swaps=()):
    """A few sentences, the likeliest cause first; swaps: rows of paired.swaps."""
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
    said = [] if gap is None else [gap.sentence()]
    return " ".join([*said, told, *_shares(swaps)])


def _shares(swaps):
    """Where the way from A's figure to B's leads through, in a sentence or none."""
    rows = sorted(_swaps(swaps)[1:], key=lambda row: -row["share"])
    if len(rows) < 2:
        return []
    told = [f"{r['after']} {r['step']:+.3g} ({r['share']:.0%})" for r in rows]
    told = [each for each, row in zip(told, rows, strict=True) if row["share"] > 0]
    return [f"From A's figure to B's: {', '.join(told)}."] if told else []


def _swaps(swaps):
    """Rows of paired.swaps as tables; share: of the whole way, there and back."""
    whole = sum(abs(step) for *_, step in swaps) or 1.0
    return [
        {"after": name, "fid": fid, "step": step, "share": abs(step) / whole}
        for name, fid, step in swaps
    ]


def save(out, report, tiles=None):
    """Writes the folder `out` with report.md, report.json and a picture."""
    with atomic_write(out) as folder:
        folder.mkdir()
        if tiles is not None:
            save_png(folder / NAMES[2], image_grid(tiles, 3))
        (folder / NAMES[1]).write_text(markdown(report, tiles is not None))
        write_json(folder / NAMES[0], report)


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
        _weights_text(report["weights"]),
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


def _weights_text(weights):
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
