"""Puts together all that is known of A and B, as JSON and as a page of Markdown."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sit_jax.diagnosis import bundle as bundles
from sit_jax.diagnosis import ladder
from sit_jax.diagnosis.causes import (
    BY_NAME,
    NEGLIGIBLE,
    Cause,
    different_weights,
    find_causes,
    manifest_differences,
)
from sit_jax.diagnosis.paired import Gap, Labels, SwapStep
from sit_jax.diagnosis.swaps import decode_latents
from sit_jax.errors import UserError
from sit_jax.evaluation.fid import Gaussian
from sit_jax.evaluation.image_sets import EvaluationInput, input_of_images, open_input
from sit_jax.files import PathLike, atomic_write, local_path, read_json, write_json
from sit_jax.sampling import outputs
from sit_jax.sampling.grid import image_grid, save_png

PICTURE = "worst_pairs.png"
ONLY_MANIFEST = (".npy", ".png")  # outputs that are not read, only their manifests


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What there is of one side.

    Attributes:
      path: as the user named it.
      bundle: what it computed for a few images.
      manifest: of the samples.
      samples: images or features.
    """

    path: Path
    bundle: bundles.Bundle | None
    manifest: dict[str, Any] | None
    samples: EvaluationInput | None

    @property
    def job(self) -> dict[str, Any]:
        """The job of the manifest, empty without one."""
        return (self.manifest or {}).get("job", {})


def open_evidence(path: PathLike, decode: bool = False) -> Evidence:
    """Opens a bundle, or samples with a manifest or a bundle beside them.

    Args:
      path: of the bundle or the samples.
      decode: whether latents become pictures, if their manifest names a VAE.

    Raises:
      UserError: There is nothing, or nothing that says anything.
    """
    path = local_path(path)
    if bundles.is_bundle(path):
        bundle = bundles.read(path)
        samples = open_input(bundle.features) if bundle.features else None
        return Evidence(path, bundle, bundle.record["manifest"], samples)
    if not path.exists():
        raise UserError(
            f"nothing at {path}; name samples, or a bundle, which diagnose.py "
            "--collect makes"
        )
    beside = path / "bundle" if path.is_dir() else path.with_name(f"{path.name}.bundle")
    bundle = bundles.read(beside) if beside.is_dir() else None
    record = outputs.manifest_path(path)
    manifest = bundle and bundle.record["manifest"]
    if record.is_file():
        manifest = read_json(record)
    if path.suffix not in ONLY_MANIFEST:
        return Evidence(path, bundle, manifest, open_input(path))
    if manifest is None:
        raise UserError(f"{path} has no manifest {record.name} beside it")
    is_decoded = decode and path.suffix == ".npy"
    images = decode_latents(path, manifest) if is_decoded else None
    return Evidence(path, bundle, manifest, images and input_of_images(images))


def are_pairs(a: Evidence, b: Evidence) -> bool:
    """Returns whether image i of both began from the same noise and label."""
    if a.manifest is None or b.manifest is None:
        return False
    starts = [
        [side.job.get(name) for name in ("seed", "noise", "labels")]
        + [side.manifest.get("noise_sha256")]
        for side in (a, b)
    ]
    return starts[0] == starts[1]


def labels_of(a: Evidence, b: Evidence) -> tuple[Labels, Labels] | None:
    """Returns the labels of both sides' images, if both are known."""
    labels = a.job.get("labels"), b.job.get("labels")
    if not all(isinstance(numbers, list) for numbers in labels):
        return None
    return np.asarray(labels[0], int), np.asarray(labels[1], int)


def diagnose(
    a: Evidence,
    b: Evidence,
    *,
    gap: Gap | None = None,
    swaps: Sequence[SwapStep] = (),
    worst: Sequence[tuple[int, float]] = (),
    reference: Gaussian | None = None,
) -> dict[str, Any]:
    """Compares two sides.

    Args:
      a: of one side, what there is.
      b: of the other.
      gap: of their FIDs.
      swaps: what exchanging components did to FID.
      worst: (image, root mean square) of the pairs that differ most.
      reference: for the FID of the few images of the bundles.

    Returns:
      The report, as it is written to report.json.
    """
    differences, weights, causes, settings = [], None, [], []
    both = (a.bundle, b.bundle) if a.bundle and b.bundle else None
    if both:
        bundles.require_same_network(*both)
        differences = ladder.compare_stages(*both)
        differences += ladder.compare_feature_figures(*both, differences, reference)
        total, names = different_weights(*both)
        weights = {"tensors": total, "differ": names}
    has_manifests = a.manifest is not None and b.manifest is not None
    if has_manifests:
        manifests = _manifests_with_evaluation(a, b)
        causes = find_causes(manifests, both, differences)
        settings = manifest_differences(*manifests)
    swap_rows = _swap_rows(swaps)
    return {
        "a": str(a.path),
        "b": str(b.path),
        "verdict": verdict(causes, gap, has_manifests, swap_rows),
        "causes": [dataclasses.asdict(cause) for cause in causes],
        "manifest": [
            {"field": field, "a": ours, "b": theirs}
            | {"cause": effect.name, "fid": effect.fid, "source": effect.source}
            for effect, field, ours, theirs in settings
        ],
        "probes": [_probe(side) for side in (a, b)],
        "weights": weights,
        "ladder": [
            {**dataclasses.asdict(d), "outside": d.outside, "inexact": d.inexact}
            for d in differences
        ],
        "first": ladder.first_difference(differences) if differences else None,
        "solver": [_solver(side) for side in (a, b)],
        "paired": gap and gap.to_json(),
        "swaps": swap_rows,
        "worst": [{"image": i, "rms": size} for i, size in worst],
    }


def verdict(
    causes: Sequence[Cause],
    gap: Gap | None,
    has_manifests: bool,
    swap_rows: Sequence[dict[str, Any]],
) -> str:
    """Returns a few sentences, the likeliest cause first."""
    likely = [c for c in causes if not c.contradicted and c.fid > NEGLIGIBLE]
    text = "Nothing differs that is known to move FID."
    if likely:
        text = f"Likeliest cause: {likely[0].headline}."
    elif not has_manifests:
        text = "Without two manifests the cause cannot be told."
    if len(likely) > 1:
        text += f" Then: {', '.join(c.name for c in likely[1:])}."
    if gap is None and [c.name for c in likely] == ["noise"]:
        return (
            "Within noise: only the noise differs, which alone moves FID by about "
            f"{likely[0].fid:g} near 2. {text}"
        )
    sentences = [text] if gap is None else [gap.sentence(), text]
    steps = sorted(swap_rows[1:], key=lambda row: -row["share"])
    if len(steps) > 1 and steps[0]["share"] > 0:
        shares = "{after} {step:+.3g} ({share:.0%})".format_map
        listed = ", ".join(shares(row) for row in steps if row["share"] > 0)
        sentences.append(f"From A's figure to B's: {listed}.")
    return " ".join(sentences)


def save(
    out: PathLike,
    report: dict[str, Any],
    tiles: UInt8[np.ndarray, "n h w 3"] | None = None,
) -> None:
    """Writes a folder with report.json, report.md and a picture of the worst pairs."""
    with atomic_write(out) as folder:
        folder.mkdir()
        if tiles is not None:
            save_png(folder / PICTURE, image_grid(tiles, 3))
        (folder / "report.md").write_text(markdown(report))
        write_json(folder / "report.json", report)


def _manifests_with_evaluation(*sides):
    """Returns the manifests, with the pipeline of features if both bundles have it."""
    key = bundles.EVALUATION
    pipelines = [side.bundle and side.bundle.record.get(key) for side in sides]
    if not all(pipelines):
        return [side.manifest for side in sides]
    pairs = zip(sides, pipelines, strict=True)
    return [side.manifest | {key: pipeline} for side, pipeline in pairs]


def _swap_rows(swaps):
    """Returns rows of the report; a share is of all steps, there and back."""
    total = sum(abs(swap.step) for swap in swaps) or 1.0
    return [
        {"after": name, "fid": fid, "step": step, "share": abs(step) / total}
        for name, fid, step in swaps
    ]


def _probe(side):
    record = side.bundle.record if side.bundle else side.manifest or {}
    precision = record.get("precision")
    if not isinstance(precision, dict):
        return None
    names = ("default dot", "model dot", "convolution", "line")
    return {name: precision.get(name) for name in names}


def _solver(side):
    solver = {}
    if side.manifest and "stats" in side.manifest:
        solver["samples"] = side.manifest["stats"]
    if side.bundle is not None:
        solver["fixed grid"] = side.bundle.record["solver"]
    return solver


# ---- Markdown, for readers who were not there ----

TABLES = {  # title: heads, and what the table means, in a sentence or two
    "Causes, the likeliest first": (
        ("cause", "FID it may move, near 2", "evidence", "known from"),
        "What differs and is known to move FID. The numbers order the list, they "
        "predict nothing. One that the stages contradict comes last.",
    ),
    "Statistics": (("", "value"), ""),
    "Swaps, from A to B": (
        ("after taking B's", "FID", "step", "share of the way"),
        "A's pictures with one component after the other taken from B. The steps add "
        "up to B's FID less A's, and say what comes from where.",
    ),
    "Stages": (
        ("stage", "relative L2", "max-abs / rms", "cosine", "band", ""),
        "The same inputs through both sides, from noise to figures. Band: what the "
        "declared precisions allow. **outside**: more than that, look there first; "
        "inexact: allowed, but float32 on both sides would not differ so much. Of "
        "bytes the first column is the share that differ, the second the most levels.",
    ),
    "Precision measured": (
        ("side", "default dot", "model's dot", "convolution", "said at the start"),
        "Bits of mantissa that each device kept of what it multiplied: 24 is float32, "
        "11 TF32, 8 bfloat16.",
    ),
    "Settings that differ": (("setting", "A", "B", "belongs to"), ""),
    "Worst pairs": (
        ("image", "rms of the difference, levels"),
        "A, B and their difference, stretched to be seen.\n\n"
        f"![A, B and the difference]({PICTURE})",
    ),
}


def markdown(report: dict[str, Any]) -> str:
    """Returns a report as one page."""
    a, b = (Path(report[side]).name for side in "ab")
    probes = zip("AB", report["probes"], strict=True)
    sections = [
        f"# Why {a} (A) and {b} (B) differ",
        f"**{report['verdict']}**",
        f"**{report['first']}**" if report["first"] else "",
        _table("Causes, the likeliest first", map(_cause_row, report["causes"])),
        _table("Statistics", _statistics_rows(report["paired"])),
        _table("Swaps, from A to B", map(_swap_cells, report["swaps"])),
        _table("Stages", map(_stage_row, report["ladder"])),
        _weights_text(report["weights"]),
        _table("Precision measured", [(n, *p.values()) for n, p in probes if p]),
        _solver_text(report["solver"]),
        _table(
            "Settings that differ",
            [(r["field"], r["a"], r["b"], r["cause"]) for r in report["manifest"]],
        ),
        _table(
            "Worst pairs", [(r["image"], f"{r['rms']:.6g}") for r in report["worst"]]
        ),
        f"A is {report['a']}, B is {report['b']}.",
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _table(title, rows):
    lines = [" | ".join(str(x).replace("|", "/") for x in row) for row in rows]
    if not lines:
        return ""
    heads, legend = TABLES[title]
    lines = [" | ".join(heads), "|".join("-" for _ in heads), *lines]
    table = "\n".join(f"| {line} |" for line in lines)
    return "\n\n".join(filter(None, (f"## {title}", legend, table)))


def _cause_row(cause):
    facts = [f"{field}: {ours}, {theirs}" for field, ours, theirs in cause["facts"][:4]]
    name, effect = cause["name"], BY_NAME.get(cause["name"])
    mark = " (the stages contradict it)" if cause["contradicted"] else ""
    size, source = (f"{effect.fid:g}", effect.source) if effect else ("unknown", "")
    return name + mark, size, "; ".join(cause["measurements"] or facts), source


def _swap_cells(row):
    name, share = row["after"], f"{row['share']:.0%}"
    return name, f"{row['fid']:.6g}", f"{row['step']:+.4g}", share


def _stage_row(row):
    mark = "**outside**" if row["outside"] else "inexact" if row["inexact"] else ""
    numbers = (f"{row[name]:.3g}" for name in ("relative", "peak"))
    return row["stage"], *numbers, f"{row['cosine']:.6f}", f"{row['band']:.2g}", mark


def _statistics_rows(paired):
    """Returns what is known of the gap of the two FIDs."""
    if not paired:
        return []
    a, b = paired["fids"]
    gap, net, interval = (paired[name] for name in ("gap", "net", "interval"))
    classes = "as they are" if paired["classes"] else "drawn too"
    noise = f"noise: deviation over seeds, classes {classes}"
    limits = None if interval is None else "{:+.4g}, {:+.4g}".format(*interval)
    rows = [
        ("FID of A to the reference", a, ".6g"),
        ("FID of B to the reference", b, ".6g"),
        ("gap, A less B", gap, "+.4g"),
        ("the same at equal numbers of images", None if net == gap else net, "+.4g"),
        (noise, paired["noise"], ".3g"),
        ("noise band: left by one in 10,000 pairs of seeds", paired["band"], ".3g"),
        ("chance of such a gap by seeds alone", paired["chance"], ".2g"),
        (f"deviation of {paired['seeds']} other seeds", paired["scatter"], ".3g"),
        ("95 % of the gap over pairs", limits, ""),
        ("FID between A and B", paired["between"], ".4g"),
        ("mean distance of pairs' features over rms", paired["feature_gap"], ".3g"),
    ]
    return [(name, format(x, spec)) for name, x, spec in rows if x is not None]


def _weights_text(weights):
    if not weights:
        return ""
    names = ", ".join(weights["differ"][:20])
    names += ", ..." if len(weights["differ"]) > 20 else ""
    count = f"{len(weights['differ'])} of {weights['tensors']} tensors differ"
    return f"## Weights\n\n{count}{': ' if names else '.'}{names}"


def _solver_text(solvers):
    if not any(solvers):
        return ""
    lines = [f"* {n}: {json.dumps(s)}" for n, s in zip("AB", solvers, strict=True)]
    return "## Solver\n\n" + "\n".join(lines)
