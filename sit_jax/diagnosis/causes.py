"""Which of all that differs between two sides made their figures differ.

A cause is declared by fields of the manifests or shown by measurements: the probe,
hashes of weights, inputs, the ladder. One that the ladder contradicts comes last.
"""

import dataclasses

import numpy as np

from sit_jax.diagnosis.effects import BY_NAME, manifest_differences
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
