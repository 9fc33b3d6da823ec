"""Compares two bundles stage by stage, against what their precisions allow.

A difference between two machines begins somewhere: the first stage that differs by more
than the declared precisions explain says where to look. Bands are those of one forward
pass of DiT-shaped networks with random weights: float32 against float32 6e-7, TF32
against float32 7e-4, one bfloat16 pass 5e-3 (emulated), each with room to spare.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sit_jax.diagnosis.bundle import Bundle
from sit_jax.errors import UserError
from sit_jax.evaluation.fid import Gaussian, frechet_distance
from sit_jax.precision.emulation import EMULATED
from sit_jax.precision.policy import PLATFORMS, PRECISIONS

EXACT = 1e-5
BANDS = {24: EXACT, 11: 2e-3, 8: 1.5e-2}  # relative L2, by bits of the products
BFLOAT16 = 3e-2  # the network's own dtype: sums and residuals are rounded too
FEATURES = 1e-3  # one level in one of a thousand bytes is 5e-4 of an enlarged picture
FEATURE_STAGES = ("resized", "features", "spatial features")
SOLVER_GROWTH = 10  # how much the steps of a solver may multiply a difference by
PIXELS = 1e-3  # share of bytes that may differ, by one level, between exact ones
UNKNOWN_GUIDANCE = 4.0  # the scale that is assumed where a config's is a function
EQUAL = "Equal within the bands: no stage differs by more than exact precision allows."


@dataclasses.dataclass(frozen=True)
class StageDifference:
    """How much one stage differs between A and B.

    Attributes:
      stage: the name of the stage.
      relative: L2 of the difference over that of A; of bytes, the share that differ.
      peak: the largest difference over A's root mean square; of bytes, in levels.
      cosine: of the angle between A's and B's values.
      band: what the declared precisions allow of `relative`.
      exact: what exact precision on both sides allows of `relative`.
    """

    stage: str
    relative: float
    peak: float
    cosine: float
    band: float
    exact: float

    @property
    def outside(self) -> bool:
        """Whether it is more than the declared precisions allow; NaN is."""
        return not self.relative <= self.band

    @property
    def inexact(self) -> bool:
        """Whether it is more than exact precision allows; NaN is."""
        return not self.relative <= self.exact


def compare_stages(a: Bundle, b: Bundle) -> list[StageDifference]:
    """Compares the stages that two bundles of one network share, inputs first."""
    width = max(precision_band(a.record), precision_band(b.record))
    differences = [
        _difference(stage, a.inputs[name], b.inputs[name], 0.0, 0.0)
        for stage, name in (("noise", "noise"), ("labels", "labels"), ("times", "t"))
    ]
    guidance_growth = _guidance_growth(a, b)
    names = a.record["stages"]
    network = names[: names.index("final layer") + 1]
    for name, ours in a.stages.items():
        if name not in b.stages:
            continue
        theirs, growth = b.stages[name], 1.0
        if name not in network:
            growth = guidance_growth
            if name != "guidance" and not name.startswith("one "):
                growth *= SOLVER_GROWTH
        band, exact = width * growth, EXACT * growth
        if name in FEATURE_STAGES:
            band, exact = max(FEATURES, band), max(FEATURES, exact)
        if ours.dtype == np.uint8:
            band = min(1.0, PIXELS * width / EXACT)
            differences.append(_byte_difference(name, ours, theirs, band))
        else:
            differences.append(_difference(name, ours, theirs, band, exact))
    return differences


def compare_feature_figures(
    a: Bundle,
    b: Bundle,
    differences: Sequence[StageDifference],
    reference: Gaussian | None = None,
) -> list[StageDifference]:
    """Compares what the features of the few pictures add up to.

    Of so few pictures FID itself means nothing, but both sides' have to agree.

    Args:
      a: a bundle.
      b: the other.
      differences: what compare_stages returned for them.
      reference: for the FID of each; without it only mean and covariance are compared.

    Returns:
      Differences of mean, covariance and FID; none where the bundles have no features.
    """
    features = next((d for d in differences if d.stage == "features"), None)
    if features is None:
        return []
    ours, theirs = (Gaussian.of(bundle.stages["features"]) for bundle in (a, b))
    bands = 2 * features.band, 2 * features.exact  # products, and squares
    figures = [
        _difference("mean of the features", ours.mean, theirs.mean, *bands),
        _difference("covariance of the features", ours.cov, theirs.cov, *bands),
    ]
    if reference is not None and len(reference.mean) == len(ours.mean):
        fids = (np.array([frechet_distance(g, reference)]) for g in (ours, theirs))
        figures.append(_difference("FID of the few", *fids, *bands))
    return figures


def precision_band(record: dict[str, Any]) -> float:
    """Returns what a bundle's declared precision allows of a forward pass.

    Raises:
      UserError: The record declares no precision that is known.
    """
    measured = record["precision"]
    try:
        precision = PRECISIONS[measured["words"]["model"]]
        if precision.dtype == "bfloat16":
            return BFLOAT16
        if measured.get("emulate") is not None:
            return BANDS[EMULATED[measured["emulate"]]]
        platform = PLATFORMS[record["environment"]["platform"]]
        return BANDS[getattr(precision, platform).min_bits]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"a bundle declares no precision that is known ({error})"
        ) from error


def first_difference(differences: Sequence[StageDifference]) -> str:
    """Says in one sentence where the two sides begin to differ."""
    outside = next((d for d in differences if d.outside), None)
    if outside is not None:
        size = f"differs by {outside.relative:.2g}, expected up to {outside.band:.2g}"
        if outside.band == 0:
            size = "is not the same"
        return f"The discrepancy starts at {outside.stage}, which {size}."
    inexact = next((d for d in differences if d.inexact), None)
    if inexact is not None:
        return (
            "Equal within the bands of the declared precisions; exact ones would not "
            f"differ by {inexact.relative:.2g} at {inexact.stage}."
        )
    return EQUAL


def _guidance_growth(a, b):
    """Returns what guidance multiplies a difference of the network's outputs by."""
    scales = [_guidance_scale(bundle.record["manifest"]) for bundle in (a, b)]
    return max(abs(scale) + abs(scale - 1) for scale in scales)


def _guidance_scale(manifest):
    scale = manifest.get("job", {}).get("config", {}).get("guidance", 1.0)
    if isinstance(scale, dict):
        scale = scale.get("scale", UNKNOWN_GUIDANCE)
    return float(scale) if isinstance(scale, int | float) else UNKNOWN_GUIDANCE


def _difference(name, ours, theirs, band, exact):
    x, y = (np.asarray(a, np.float64).ravel() for a in (ours, theirs))
    gap, norm = x - y, np.linalg.norm(x)
    rms = norm / np.sqrt(max(len(x), 1))
    norms = norm * np.linalg.norm(y)
    return StageDifference(
        name,
        relative=float(np.linalg.norm(gap) / (norm or 1.0)),
        peak=float(np.abs(gap).max(initial=0) / (rms or 1.0)),
        cosine=float(x @ y / norms) if norms else float(np.array_equal(x, y)),
        band=band,
        exact=exact,
    )


def _byte_difference(name, ours, theirs, band):
    gap = np.abs(ours.astype(np.int16) - theirs)
    difference = _difference(name, ours, theirs, band, PIXELS)
    share, peak = float((gap > 0).mean()), float(gap.max(initial=0))
    return dataclasses.replace(difference, relative=share, peak=peak)
