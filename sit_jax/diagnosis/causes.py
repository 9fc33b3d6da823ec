"""Which of all that differs between two sides made their figures differ.

A cause is declared by fields of the manifests or shown by measurements: the probe,
hashes of weights, inputs, the ladder. One that the ladder contradicts comes last.
"""

import dataclasses
import json
import re
from typing import NamedTuple

import numpy as np

from sit_jax.config import difference
from sit_jax.evaluation.evaluate import label_policy, manifest_classes

# Stages that nothing else enters after the one before them
ONLY = {"decoded": "decoder", "uint8": "rounding", "resized": "resize"}


@dataclasses.dataclass
class Cause:
    """facts: [(field, A's value, B's)]; said: what was measured, in words."""

    name: str
    fid: float
    facts: list
    said: list
    contradicted: bool = False

    @property
    def headline(self):
        said = self.said[:2] or [f"{n}: {a} and {b}" for n, a, b in self.facts[:2]]
        return f"{self.name} ({'; '.join(said)})"


def causes(manifests, bundles=None, rungs=()):
    """Pairs of manifests and Bundles, their ladder -> [Cause], likeliest first."""
    found = {}

    def cause(name):
        return found.setdefault(name, Cause(name, BY_NAME[name].fid, [], []))

    for effect, *fact in manifest_differences(*manifests):
        cause(effect.name).facts.append(tuple(fact))
    _judge_labels(found, cause, *manifests)
    if bundles is not None:
        _judge_bundles(found, cause, bundles)
        _judge_ladder(found, rungs)
    _judge_names(found, bundles)
    order = lambda c: (c.contradicted, -c.fid)
    return sorted((c for c in found.values() if c.facts or c.said), key=order)


def _judge_labels(found, cause, a, b):
    labels = [np.asarray(m.get("job", {}).get("labels", []), int) for m in (a, b)]
    counts = [len(each) for each in labels]
    if counts[0] != counts[1]:
        cause("number of images").said.append(f"{counts[0]} and {counts[1]} images")
    if "labels" not in found:
        return
    words = [
        label_policy(each, manifest_classes(m))
        for each, m in zip(labels, (a, b), strict=True)
    ]
    if words == ["random", "random"] and "noise" in found:
        found.pop("labels")  # other draws of the same kind, by another seed
        found["noise"].said.append("another seed drew noise and labels")
        return
    small = min(counts)
    other = int((labels[0][:small] != labels[1][:small]).sum())
    kinds = f"{words[0]} and {words[1]}; " if words[0] != words[1] else ""
    found["labels"].said.append(f"{kinds}{other} of {small} differ")


def _judge_bundles(found, cause, bundles):
    one, other = (bundle.record["weights"] for bundle in bundles)
    odd = [n for n in sorted(one.keys() | other.keys()) if one.get(n) != other.get(n)]
    if odd:
        shown = ", ".join(odd[:3]) + (", ..." if len(odd) > 3 else "")
        total = len(one.keys() | other.keys())
        said = f"{len(odd)} of {total} tensors differ: {shown}"
        items = [b.record["manifest"].get("job", {}).get("item") for b in bundles]
        if items[0] != items[1]:
            words = {"ema": "the average (EMA)", "params": "the raw weights"}
            said = f"{' against '.join(words.get(i, str(i)) for i in items)}; {said}"
        cause("weights").said.append(said)
    elif "weights" in found:
        found.pop("weights")  # the same tensors, whatever their file is called
    bits = [_bits(bundle.record["precision"]) for bundle in bundles]
    if bits[0] != bits[1]:
        cause("precision").said.insert(
            0, f"products keep {bits[0]} and {bits[1]} bits ({_words(bundles)})"
        )


def _judge_ladder(found, rungs):
    """Marks what the ladder contradicts; adds what nothing explains."""
    at = {("steps" if r.stage.endswith(" steps") else r.stage): r for r in rungs}
    identical = all(
        at[n].relative == 0 for n in ("noise", "labels", "times") if n in at
    )
    for one in found.values():
        effect = BY_NAME[one.name]
        seen = [at[stage] for stage in effect.stages if stage in at]
        inputs = one.name in ("noise", "labels")  # a bundle may have taken the other's
        if identical and seen and not inputs and not any(r.inexact for r in seen):
            moved = one.name == "solver" and not _changes_method(one)
            one.contradicted = not moved
    rungs = list(rungs)
    odd = next((i for i, rung in enumerate(rungs) if rung.outside), None)
    if odd is None or any(_explains(one, rungs, odd) for one in found.values()):
        return
    stage, size = rungs[odd].stage, f"{rungs[odd].relative:.2g} off"
    said = f"nothing declared explains {stage}, {size}"
    name = ONLY.get(stage)
    if name is None:
        found["unexplained"] = Cause("unexplained", 1e3, [], [said])
    else:  # measured, so it comes before all that is declared
        found[name] = Cause(name, 1e3, [], [f"undeclared: {stage} is {size}"])


def _explains(one, rungs, odd):
    """Whether a cause shows at the first odd rung, or before it."""
    if one.contradicted or one.fid <= BY_NAME["batch coupling"].fid:
        return False
    if one.name in ("weights", "network"):
        return rungs[odd].stage not in ("noise", "labels", "times")
    stages = BY_NAME[one.name].stages
    names = ["steps" if r.stage.endswith(" steps") else r.stage for r in rungs]
    first = [names.index(s) for s in stages if s in names]
    return any(rungs[i].inexact for i in first if i <= odd)


def _judge_names(found, bundles):
    """Paths of weights and counts say little where better is known."""
    if "weights" in found and bundles is None:
        facts = found["weights"].facts
        if not any(
            n in ("weights_sha256", "job.item", "weak_sha256") for n, *_ in facts
        ):
            found.pop("weights")
    if "rounding" in found:  # one fact, which stands twice
        found["rounding"].facts = found["rounding"].facts[:1]
    for name in ("training", "the record"):
        found.pop(name, None)


def _changes_method(one):
    return any(n.endswith((".method.name", ".method", ".make")) for n, *_ in one.facts)


def _bits(measured):
    return min(measured.get("model dot", 0), measured.get("convolution", 0))


def _words(bundles):
    said = []
    for bundle in bundles:
        measured = bundle.record["precision"]
        word = measured.get("words", {}).get("model")
        emulating = measured.get("emulate")
        said.append(f"{word}, emulating {emulating}" if emulating else str(word))
    return " and ".join(said)


LONGEST = 70  # characters of a value that is shown
HASH = "[0-9a-f]{64}"  # of which fewer do


class Effect(NamedTuple):
    """fields: prefixes of manifest fields. stage: where it first shows, None: nowhere
    in the ladder, or not for sure.
    """

    name: str
    fid: float
    fields: tuple
    stages: tuple
    source: str


EFFECTS = (
    Effect("network", 100.0, ("job.config.model", "job.config.shape", "job.heads",
        "job.family", "job.config.process"), (), "another network or process"),
    Effect("weights", 10.0, ("weights_sha256", "job.item", "weak_sha256", "job.weak",
        "job.weights"), (), "any tensor that differs; EMA against raw weights"),
    Effect("guidance scale", 7.0, ("job.config.guidance.", "job.config.guidance"),
        ("guidance",), "9.5 without, 2.1 with 1.5 (SiT issue 31)"),
    Effect("number of images", 2.0, (), (), "10k against 50k: factor 2 to 3"),
    Effect("solver", 1.0, ("job.config.sampler",), ("steps",),
        "SiT-XL/2 unguided: ODE 9.4, SDE 8.3 (SiT issue 31)"),
    Effect("decoder", 0.2, ("codec.decoder_sha256", "codec.scale", "codec.kind",
        "codec.decoding", "job.vae"), ("decoded",),
        "ft-ema 2.27, ft-mse 2.30, original 2.46 (DiT's table)"),
    Effect("resize", 0.3, ("evaluation.resize",), ("resized",),
        "2.45 became 2.15 when it was corrected (SiT issue 14)"),
    Effect("features", 0.2, ("evaluation.",), ("features",),
        "another network, other weights or products; not to be mixed"),
    Effect("labels", 0.15, ("job.labels",), ("labels",),
        "50 for each class against random: tenths (LDM issue 262)"),
    Effect("rounding", 0.1, ("job.rounding", "codec.rounding"), ("uint8",),
        "MDT's rule is 0.48 level darker; 48 % of the bytes differ"),
    Effect("precision", 0.09, ("job.emulate", "job.config.precision.model",
        "job.config.model.dtype", "precision."),
        ("time embedding", "patches", "final layer"),
        "claimed for TPU against GPU: 0.06 (DiT), 0.09 (SiT), both confounded"),
    Effect("precision of the VAE", 0.08, ("job.config.precision.vae",
        "codec.precision"), ("decoded",), "up to visible banding in bfloat16"),
    Effect("noise", 0.05, ("job.seed", "job.noise", "noise_sha256",
        "threefry_partitionable"), ("noise",), "1.34 against 1.39 by its layout alone"),
    Effect("guided channels", 0.04, ("job.config.guidance_channels",), ("guidance",),
        "1.5 on three channels 2.27, 1.375 on four 2.23 (DiT issue 41)"),
    Effect("batch coupling", 0.01, ("job.batch_size", "batch_size"), (),
        "6e-4 of the samples where an adaptive solver's norm spans the batch"),
    Effect("solver counts", 0.009, ("stats.",), (), "follow from the solver"),
    Effect("platform", 0.005, ("platform", "device", "devices", "hosts", "packages.",
        "python", "matmul_precision"), (), "1e-6 to 1e-5 in float32"),
    Effect("training", 0.0, ("job.config.",), (), "none on given weights"),
    Effect("the record", 0.0, ("",), (), "none"),
)  # fmt: skip
IGNORED = ("command", "seconds", "precision.line", "precision.flags")  # prefixes
BY_NAME = {effect.name: effect for effect in EFFECTS}


def manifest_differences(a, b):
    """Two manifests -> [(Effect, field, value, value)], the largest effect first."""
    found = []
    for field, one, other in difference(a, b):
        if not field.startswith(IGNORED):
            found.append((_effect(field), field, _short(one), _short(other)))
    return sorted(found, key=lambda row: -row[0].fid)


def _effect(field):
    for effect in EFFECTS:
        if any(field == p or field.startswith(p.rstrip(".") + ".") or p == ""
               for p in effect.fields):  # fmt: skip
            return effect
    return EFFECTS[-1]


def _short(value):
    try:
        value = json.loads(value)
    except ValueError:
        return value
    if isinstance(value, dict) and set(value) == {"name"}:
        value = value["name"].removeprefix("sit_jax.")
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} values"
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch(HASH, text):
        return f"{text[:12]}..."
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
