"""How much each setting is known to move FID-50K, where FID is about 2.

Orders of magnitude from the threads and tables named in `source`, which are needed to
order a list of differences and are no prediction. Those of DiT's tables are quoted from
memory of the paper.
"""

import json
import re
from typing import NamedTuple

from sit_jax.config import difference

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
