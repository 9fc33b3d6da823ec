"""Names which of all that differs between two sides made their figures differ.

A cause is declared by fields of the manifests or shown by measurements: the probe,
hashes of weights, inputs, the stages. One that the stages contradict comes last.

FID_EFFECTS are orders of magnitude from the threads and tables named in `source`. They
order a list of differences and predict nothing. Those of DiT's tables are quoted from
memory of the paper.
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from sit_jax.config import difference
from sit_jax.diagnosis.bundle import Bundle
from sit_jax.diagnosis.ladder import StageDifference
from sit_jax.evaluation.evaluate import label_policy, manifest_classes

MAX_CHARACTERS = 70  # of a value that is shown
SHA256 = "[0-9a-f]{64}"  # of which fewer are shown
IGNORED = ("command", "seconds", "precision.line", "precision.flags")  # prefixes
HASHES = {"weights_sha256", "job.item", "weak_sha256"}  # fields that tell weights apart
INPUTS = ("noise", "labels", "times")  # stages that are given, not computed

# Stages that nothing else enters after the one before them: they name the cause
STAGE_CAUSES = {"decoded": "decoder", "uint8": "rounding", "resized": "resize"}
MEASURED = 1e3  # before all that is only declared


class FIDEffect(NamedTuple):
    """How much a setting is known to move FID-50K, where FID is about 2.

    Attributes:
      name: of the cause.
      fid: by how much FID may move.
      fields: prefixes of the manifest fields that declare it.
      stages: those where it first shows; none if in no stage, or not for sure.
      source: where that is known from.
    """

    name: str
    fid: float
    fields: tuple[str, ...]
    stages: tuple[str, ...]
    source: str


FID_EFFECTS = (
    FIDEffect("network", 100.0, ("job.config.model", "job.config.shape", "job.heads",
        "job.family", "job.config.process"), (), "another network or process"),
    FIDEffect("weights", 10.0, ("weights_sha256", "job.item", "weak_sha256", "job.weak",
        "job.weights"), (), "any tensor that differs; EMA against raw weights"),
    FIDEffect("guidance scale", 7.0, ("job.config.guidance.", "job.config.guidance"),
        ("guidance",), "9.5 without, 2.1 with 1.5 (SiT issue 31)"),
    FIDEffect("number of images", 2.0, (), (), "10k against 50k: factor 2 to 3"),
    FIDEffect("solver", 1.0, ("job.config.sampler",), ("steps",),
        "SiT-XL/2 unguided: ODE 9.4, SDE 8.3 (SiT issue 31)"),
    FIDEffect("decoder", 0.2, ("codec.decoder_sha256", "codec.scale", "codec.kind",
        "codec.decoding", "job.vae"), ("decoded",),
        "ft-ema 2.27, ft-mse 2.30, original 2.46 (DiT's table)"),
    FIDEffect("resize", 0.3, ("evaluation.resize",), ("resized",),
        "2.45 became 2.15 when it was corrected (SiT issue 14)"),
    FIDEffect("features", 0.2, ("evaluation.",), ("features",),
        "another network, other weights or products; not to be mixed"),
    FIDEffect("labels", 0.15, ("job.labels",), ("labels",),
        "50 for each class against random: tenths (LDM issue 262)"),
    FIDEffect("rounding", 0.1, ("job.rounding", "codec.rounding"), ("uint8",),
        "MDT's rule is 0.48 level darker; 48 % of the bytes differ"),
    FIDEffect("precision", 0.09, ("job.emulate", "job.config.precision.model",
        "job.config.model.dtype", "precision."),
        ("time embedding", "patches", "final layer"),
        "claimed for TPU against GPU: 0.06 (DiT), 0.09 (SiT), both confounded"),
    FIDEffect("precision of the VAE", 0.08, ("job.config.precision.vae",
        "codec.precision"), ("decoded",), "up to visible banding in bfloat16"),
    FIDEffect("noise", 0.05, ("job.seed", "job.noise", "noise_sha256",
        "threefry_partitionable"), ("noise",), "1.34 against 1.39 by its layout alone"),
    FIDEffect("guided channels", 0.04, ("job.config.guidance_channels",), ("guidance",),
        "1.5 on three channels 2.27, 1.375 on four 2.23 (DiT issue 41)"),
    FIDEffect("batch coupling", 0.01, ("job.batch_size", "batch_size"), (),
        "6e-4 of the samples where an adaptive solver's norm spans the batch"),
    FIDEffect("solver counts", 0.009, ("stats.",), (), "follow from the solver"),
    FIDEffect("platform", 0.005, ("platform", "device", "devices", "hosts", "packages.",
        "python", "matmul_precision"), (), "1e-6 to 1e-5 in float32"),
    FIDEffect("training", 0.0, ("job.config.",), (), "none on given weights"),
    FIDEffect("the record", 0.0, ("",), (), "none"),
)  # fmt: skip
BY_NAME = {effect.name: effect for effect in FID_EFFECTS}
NEGLIGIBLE = BY_NAME["batch coupling"].fid


@dataclasses.dataclass
class Cause:
    """Something that may have made the figures differ.

    Attributes:
      name: of an FIDEffect, or "unexplained".
      fid: what orders the causes.
      facts: (field, A's value, B's) of the manifests.
      measurements: what was measured, in words.
      contradicted: whether the stages show that it had no effect.
    """

    name: str
    fid: float
    facts: list[tuple[str, Any, Any]] = dataclasses.field(default_factory=list)
    measurements: list[str] = dataclasses.field(default_factory=list)
    contradicted: bool = False

    @property
    def headline(self) -> str:
        """The name and the first evidence, in a few words."""
        evidence = self.measurements[:2] or [
            f"{n}: {a} and {b}" for n, a, b in self.facts[:2]
        ]
        return f"{self.name} ({'; '.join(evidence)})"


def find_causes(
    manifests: Sequence[dict[str, Any]],
    bundles: tuple[Bundle, Bundle] | None = None,
    differences: Sequence[StageDifference] = (),
) -> list[Cause]:
    """Finds what may have made A's and B's figures differ.

    Args:
      manifests: of A and of B.
      bundles: of A and of B, if there are both.
      differences: of the bundles' stages.

    Returns:
      The causes, the likeliest first.
    """
    causes = {effect.name: Cause(effect.name, effect.fid) for effect in FID_EFFECTS}
    for effect, *fact in manifest_differences(*manifests):
        causes[effect.name].facts.append(tuple(fact))
    _check_labels(causes, *manifests)
    weights, rounding = causes["weights"], causes["rounding"]
    if bundles is not None:
        _check_bundles(causes, bundles)
    elif not HASHES.intersection(field for field, *_ in weights.facts):
        weights.facts.clear()  # another path says nothing
    del rounding.facts[1:]  # one fact, which stands twice
    causes = {n: c for n, c in causes.items() if c.fid and (c.facts or c.measurements)}
    if bundles is not None:
        _check_stages(causes, differences)
    return sorted(causes.values(), key=lambda cause: (cause.contradicted, -cause.fid))


def manifest_differences(
    a: dict[str, Any], b: dict[str, Any]
) -> list[tuple[FIDEffect, str, Any, Any]]:
    """Returns what differs between two manifests, the largest effect first.

    Returns:
      Rows of effect, field, A's value and B's.
    """
    rows = [
        (_effect_of(field), field, _shorten(ours), _shorten(theirs))
        for field, ours, theirs in difference(a, b)
        if not field.startswith(IGNORED)
    ]
    return sorted(rows, key=lambda row: -row[0].fid)


def _check_labels(causes, a, b):
    labels = [np.asarray(m.get("job", {}).get("labels", []), int) for m in (a, b)]
    counts = [len(numbers) for numbers in labels]
    if counts[0] != counts[1]:
        text = f"{counts[0]} and {counts[1]} images"
        causes["number of images"].measurements.append(text)
    if not causes["labels"].facts:
        return
    policies = [
        label_policy(numbers, manifest_classes(manifest))
        for numbers, manifest in zip(labels, (a, b), strict=True)
    ]
    if policies == ["random", "random"] and causes["noise"].facts:
        causes["labels"].facts.clear()  # other draws of the same kind, by another seed
        causes["noise"].measurements.append("another seed drew noise and labels")
        return
    count = min(counts)
    changed = int((labels[0][:count] != labels[1][:count]).sum())
    kinds = f"{' and '.join(policies)}; " if policies[0] != policies[1] else ""
    causes["labels"].measurements.append(f"{kinds}{changed} of {count} differ")


def _check_bundles(causes, bundles):
    total, names = different_weights(*bundles)
    if names:
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        text = f"{len(names)} of {total} tensors differ: {listed}"
        items = [b.record["manifest"].get("job", {}).get("item") for b in bundles]
        if items[0] != items[1]:
            words = {"ema": "the average (EMA)", "params": "the raw weights"}
            text = f"{' against '.join(words.get(i, str(i)) for i in items)}; {text}"
        causes["weights"].measurements.append(text)
    else:  # the same tensors, whatever their file is called
        causes["weights"].facts.clear()
    bits = [
        min(probe.get("model dot", 0), probe.get("convolution", 0))
        for probe in (bundle.record["precision"] for bundle in bundles)
    ]
    if bits[0] != bits[1]:
        settings = " and ".join(_precision_setting(bundle) for bundle in bundles)
        text = f"products keep {bits[0]} and {bits[1]} bits ({settings})"
        causes["precision"].measurements.insert(0, text)


def different_weights(a: Bundle, b: Bundle) -> tuple[int, list[str]]:
    """Returns the number of tensors, and the names of those that differ."""
    ours, theirs = a.record["weights"], b.record["weights"]
    names = sorted(ours.keys() | theirs.keys())
    return len(names), [name for name in names if ours.get(name) != theirs.get(name)]


def _check_stages(causes, differences):
    """Marks the causes that the stages contradict, and adds what none explains."""
    stages = ["steps" if d.stage.endswith(" steps") else d.stage for d in differences]
    by_stage = dict(zip(stages, differences, strict=True))
    same_inputs = all(by_stage[n].relative == 0 for n in INPUTS if n in by_stage)
    for cause in causes.values():
        compared = [by_stage[s] for s in BY_NAME[cause.name].stages if s in by_stage]
        # a bundle may have taken the other's noise and labels
        is_input = cause.name in ("noise", "labels")
        if same_inputs and compared and not is_input:
            # a bundle's own fixed grid does not show an adaptive solver's settings
            shows = cause.name != "solver" or _changes_method(cause)
            cause.contradicted = shows and not any(d.inexact for d in compared)
    first = next((i for i, d in enumerate(differences) if d.outside), None)
    if first is None:
        return
    before = {s for s, d in zip(stages, differences, strict=True) if d.inexact}
    before &= set(stages[: first + 1])
    if any(_explains(c, stages[first], before) for c in causes.values()):
        return
    stage, size = differences[first].stage, f"{differences[first].relative:.2g} off"
    name = STAGE_CAUSES.get(stage, "unexplained")
    text = f"nothing declared explains {stage}, {size}"
    if name != "unexplained":
        text = f"undeclared: {stage} is {size}"
    causes[name] = Cause(name, MEASURED, measurements=[text])


def _explains(cause, stage, inexact_stages):
    """Returns whether a cause shows at the first stage outside, or before it."""
    if cause.contradicted or cause.fid <= NEGLIGIBLE:
        return False
    if cause.name in ("weights", "network"):
        return stage not in INPUTS
    return not inexact_stages.isdisjoint(BY_NAME[cause.name].stages)


def _changes_method(cause):
    return any(
        n.endswith((".method.name", ".method", ".make")) for n, *_ in cause.facts
    )


def _precision_setting(bundle):
    precision = bundle.record["precision"]
    name, emulated = precision.get("words", {}).get("model"), precision.get("emulate")
    return f"{name}, emulating {emulated}" if emulated else str(name)


def _effect_of(field):
    for effect in FID_EFFECTS:
        for prefix in effect.fields:
            if field == prefix or field.startswith(prefix.rstrip(".") + "."):
                return effect
    return FID_EFFECTS[-1]


def _shorten(value):
    """Returns a field's value, which `difference` gives as JSON, to be shown."""
    try:
        value = json.loads(value)
    except ValueError:
        return value
    if isinstance(value, dict) and set(value) == {"name"}:
        value = value["name"].removeprefix("sit_jax.")
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} values"
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch(SHA256, text):
        return f"{text[:12]}..."
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."
