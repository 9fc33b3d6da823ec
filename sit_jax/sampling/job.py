"""Describes a set of samples: all that decides them, as it stands in their manifest."""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from sit_jax import config as configs
from sit_jax.adapters.quantize import SKIP
from sit_jax.errors import UserError
from sit_jax.files import as_path, parse_json

KINDS = {  # of fields that are no words
    "config": dict,
    "labels": list,
    "lora": (list, tuple),
    "heads": (int, type(None)),
    "seed": int,
    "batch_size": int,
}


@dataclasses.dataclass(frozen=True)
class SamplingJob:
    """Which images to draw, and how.

    config: JSON of the run's config with the sampler and guidance wanted. labels int
    [N]. noise: None (from the seed), torch:SEED, or the path of a .npy. weak: weights
    to lead away from (autoguidance). vae: a folder, file or name. emulate: see
    emulation.EMULATED. Sizes of batches matter to adaptive solvers alone.
    """

    weights: str
    config: dict
    labels: np.ndarray
    item: str = "ema"
    family: str | None = None  # these two are for a bare torch file
    heads: int | None = None
    seed: int = 0
    noise: str | None = None
    batch_size: int = 64
    weak: str | None = None
    vae: str | None = None
    rounding: str = "dit"
    emulate: str | None = None
    lora: tuple[str, ...] = ()  # PATH or PATH:WEIGHT of adapters put on the weights
    quantize: str | None = None  # a form of quantized.py
    quantize_skip: str = SKIP

    def to_json(self) -> dict[str, Any]:
        """Returns the job as it stands in a manifest."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        fields["lora"] = list(self.lora)
        return {**fields, "labels": np.asarray(self.labels).tolist()}

    @classmethod
    def from_json(cls, record: Any, path: Any) -> "SamplingJob":
        """Returns the job of a manifest; refuses unknown and missing fields."""
        names = {f.name for f in dataclasses.fields(cls)}
        # from before there were adapters and int8 weights
        later = {"lora": (), "quantize": None, "quantize_skip": SKIP}
        if not isinstance(record, dict) or names != {*later, *record}:
            raise UserError(f"{path} is not the manifest of samples of this version")
        record = later | record
        for name, value in record.items():
            kinds = KINDS.get(name, (str, type(None)))
            if not isinstance(value, kinds) or isinstance(value, bool):
                kind = type(value).__name__
                raise UserError(f"{path}: its {name} is a {kind}; not a manifest")
        try:
            labels = np.asarray(record["labels"])
        except ValueError:  # lists of several lengths
            labels = np.zeros(0)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) == 0:
            raise UserError(f"{path}: its labels are no list of whole numbers")
        if labels.min() < 0 or labels.max() >= 2**31 or record["batch_size"] < 1:
            raise UserError(f"{path}: its labels or its batch size make no sense")
        lists = {"labels": labels.astype(np.int32), "lora": tuple(record["lora"])}
        return cls(**{**record, **lists})

    @property
    def digest(self) -> str:
        """The sha256 of the job: two jobs of one digest draw the same images."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(path: Any) -> tuple[SamplingJob, str | None]:
    """Returns the job recorded in a manifest, and the sha256 of its weights."""
    path = as_path(path)
    if path.is_dir():
        path = path / "manifest.json"
    try:
        record = parse_json(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--from-manifest {path}: no manifest to read") from error
    if not isinstance(record, dict) or "job" not in record:
        raise UserError(f"--from-manifest {path} is not the manifest of samples")
    job = SamplingJob.from_json(record["job"], path)
    configs.from_json(job.config)  # refuses what it may not name
    return job, record.get("weights_sha256")
