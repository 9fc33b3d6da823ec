"""Two bundles, stage by stage on identical inputs, against what their precisions allow.

A difference between two machines begins somewhere: the first stage that differs by more
than the declared precisions explain says where to look. Bands are those of one forward
pass of DiT-shaped networks with random weights: float32 against float32 6e-7, TF32
against float32 7e-4, one bfloat16 pass 5e-3 (emulated), each with room to spare.
"""

import dataclasses

import numpy as np

from sit_jax.errors import UserError
from sit_jax.evaluation.fid import Gaussian, frechet_distance
from sit_jax.precision.emulation import EMULATED
from sit_jax.precision.policy import PLATFORMS, PRECISIONS

EXACT = 1e-5
BANDS = {24: EXACT, 11: 2e-3, 8: 1.5e-2}  # relative L2, by bits of the products
BFLOAT16 = 3e-2  # the network's own dtype: sums and residuals are rounded too
FEATURES = 1e-3  # one level in one of a thousand bytes is 5e-4 of an enlarged picture
JUDGED = ("resized", "features", "spatial features")
STEPS = 10  # how much the steps of a solver may multiply a difference by
EQUAL = "Equal within the bands: no stage differs by more than exact precision allows."
PIXELS = 1e-3  # share of bytes that may differ, by one level, between exact ones


@dataclasses.dataclass(frozen=True)
class Rung:
    """One stage on both sides.

    relative: L2 of the difference over that of A; peak: its largest value over A's root
    mean square. For bytes, relative is the share that differ and peak is in levels.
    band: what the declared precisions allow of `relative`; exact: what exact ones do.
    """

    stage: str
    relative: float
    peak: float
    cosine: float
    band: float
    exact: float

    @property
    def outside(self):
        return not self.relative <= self.band

    @property
    def inexact(self):
        return not self.relative <= self.exact


def climb(a, b):
    """Two Bundles of one network -> [Rung], inputs first."""
    wide = max(band(a.record), band(b.record))
    rungs = [_rung(n, a.inputs[n], b.inputs[n], 0.0, 0.0) for n in ("noise", "labels")]
    rungs.append(_rung("times", a.inputs["t"], b.inputs["t"], 0.0, 0.0))
    scale = _guidance(a, b)
    for name, ours in a.stages.items():
        if name not in b.stages:
            continue
        theirs, factor = b.stages[name], 1.0
        if name not in a.record["stages"][: _network_end(a)]:
            factor = scale
            if name != "guidance" and not name.startswith("one "):
                factor *= STEPS
        if name in JUDGED:
            bands = (max(FEATURES, size * factor) for size in (wide, EXACT))
            rungs.append(_rung(name, ours, theirs, *bands))
        elif ours.dtype == np.uint8:
            allowed = min(1.0, PIXELS * wide / EXACT)
            rungs.append(_bytes(name, ours, theirs, allowed))
        else:
            rungs.append(_rung(name, ours, theirs, wide * factor, EXACT * factor))
    return rungs


def figures(a, b, rungs, reference=None):
    """Rungs of what features of the few pictures add up to; reference: a Gaussian.

    Of so few, FID itself means nothing, but both sides' have to agree.
    """
    below = next((rung for rung in rungs if rung.stage == "features"), None)
    if below is None:
        return []
    sides = [Gaussian.of(each.stages["features"]) for each in (a, b)]
    bands = 2 * below.band, 2 * below.exact  # products, and squares
    found = [
        _rung(f"{word} of the features", *(getattr(s, name) for s in sides), *bands)
        for word, name in (("mean", "mean"), ("covariance", "cov"))
    ]
    if reference is not None and len(reference.mean) == len(sides[0].mean):
        fids = [np.array([frechet_distance(side, reference)]) for side in sides]
        found.append(_rung("FID of the few", *fids, *bands))
    return found


def band(record):
    """What the precision that a bundle's manifest declares allows of a forward pass."""
    measured = record["precision"]
    try:
        word = PRECISIONS[measured["words"]["model"]]
        if word.dtype == "bfloat16":
            return BFLOAT16
        if measured.get("emulate") is not None:
            return BANDS[EMULATED[measured["emulate"]]]
        platform = PLATFORMS[record["environment"]["platform"]]
        return BANDS[getattr(word, platform).min_bits]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"a bundle declares no precision that is known ({error})"
        ) from error


def first(rungs, fault):
    """-> the first rung of which fault(rung), or None."""
    return next((rung for rung in rungs if fault(rung)), None)


def sentence(rungs):
    """Where the two begin to differ, in one sentence."""
    odd = first(rungs, lambda rung: rung.outside)
    if odd is not None:
        how = (
            "is not the same"
            if odd.band == 0
            else (f"differs by {odd.relative:.2g}, expected up to {odd.band:.2g}")
        )
        return f"The discrepancy starts at {odd.stage}, which {how}."
    odd = first(rungs, lambda rung: rung.inexact)
    if odd is not None:
        return (
            "Equal within the bands of the declared precisions; exact ones would not "
            f"differ by {odd.relative:.2g} at {odd.stage}."
        )
    return EQUAL


def _network_end(bundle):
    return bundle.record["stages"].index("final layer") + 1


def _guidance(a, b):
    """What guidance multiplies a difference of the network's outputs by."""
    scales = [_scale(each.record["manifest"]) for each in (a, b)]
    return max(abs(s) + abs(s - 1) for s in scales)


def _scale(manifest):
    found = manifest.get("job", {}).get("config", {}).get("guidance", 1.0)
    if isinstance(found, dict):
        found = found.get("scale", 4.0)
    return float(found) if isinstance(found, int | float) else 4.0


def _rung(name, ours, theirs, allowed, exact):
    x, y = (np.asarray(a, np.float64).ravel() for a in (ours, theirs))
    gap, size = x - y, np.linalg.norm(x)
    rms = size / np.sqrt(max(len(x), 1))
    both = size * np.linalg.norm(y)
    return Rung(
        name,
        float(np.linalg.norm(gap) / (size or 1.0)),
        float(np.abs(gap).max(initial=0) / (rms or 1.0)),
        float(x @ y / both) if both else float(np.array_equal(x, y)),
        allowed,
        exact,
    )


def _bytes(name, ours, theirs, allowed):
    gap = np.abs(ours.astype(np.int16) - theirs)
    rung = _rung(name, ours, theirs, allowed, PIXELS)
    share, peak = float((gap > 0).mean()), float(gap.max(initial=0))
    return dataclasses.replace(rung, relative=share, peak=peak)
