"""Stores what one machine computed for a few images, as a folder of JSON and arrays.

Two such folders, from whatever machines, are compared by ladder.py. Nothing but numpy
is needed to write one: see FORMAT, FILES and Bundle.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Num

from sit_jax.errors import UserError
from sit_jax.files import PathLike, as_path, atomic_write, local_path, parse_json
from sit_jax.sampling.outputs import ArrayFile

FORMAT = "sit_jax bundle 1"
FILES = ("bundle.json", "arrays.npz")
FEATURES = "features.npz"
INPUTS = ("noise", "t", "labels")
KEYS = {  # of bundle.json, and what each must be
    "manifest": dict,  # of the samples, as sample.py writes it
    "architecture": dict,
    "weights": dict,  # tensor: sha256
    "precision": dict,  # the probe's bits, and the settings
    "environment": dict,  # of the machine that collected
    "solver": dict,  # of the fixed grid: steps, evaluations
    "stages": list,  # names, in the order in which they are computed
}
EVALUATION = "evaluation"  # optional: the pipeline of the features among the stages


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What one machine computed for n images.

    Attributes:
      path: the folder.
      record: the content of bundle.json, see KEYS.
      inputs: arrays of INPUTS; the noise is [n, h, w, c].
      stages: arrays [n, ...] by name, in the order of the computation.
    """

    path: Path
    record: dict[str, Any]
    inputs: dict[str, Num[np.ndarray, "n ..."]]
    stages: dict[str, Num[np.ndarray, "n ..."]]

    @property
    def features(self) -> Path | None:
        """The path of the samples' features, if they were kept."""
        path = self.path / FEATURES
        return path if path.is_file() else None


def is_bundle(path: PathLike) -> bool:
    """Returns whether a path is a folder of a bundle."""
    return (Path(path) / FILES[0]).is_file()


def write(bundle: Bundle, features: PathLike | None = None) -> None:
    """Writes a bundle to its path, whole or not at all, with an .npz of features."""
    arrays = {f"input {name}": bundle.inputs[name] for name in INPUTS}
    for i, name in enumerate(bundle.record["stages"]):
        arrays[f"stage {i}"] = bundle.stages[name]
    with atomic_write(bundle.path) as folder:
        folder.mkdir()
        np.savez(folder / FILES[1], **arrays)
        record = {"format": FORMAT, **bundle.record}
        (folder / FILES[0]).write_text(json.dumps(record, indent=1))
        if features is not None:
            (folder / FEATURES).write_bytes(as_path(features).read_bytes())


def read(path: PathLike) -> Bundle:
    """Reads a bundle.

    Raises:
      UserError: It is no bundle, or not a whole one.
    """
    path = local_path(path)
    record = read_record(path / FILES[0])
    file = ArrayFile(path / FILES[1])
    inputs = {name: _read_array(file, f"input {name}") for name in INPUTS}
    stages = {
        name: _read_array(file, f"stage {i}") for i, name in enumerate(record["stages"])
    }
    counts = {len(array) for array in (*inputs.values(), *stages.values())}
    if len(counts) != 1:
        raise UserError(
            f"{path} holds arrays of {sorted(counts)} images: collect again"
        )
    return Bundle(path, record, inputs, stages)


def require_same_network(a: Bundle, b: Bundle) -> None:
    """Refuses bundles whose stages cannot be compared."""
    ours, theirs = a.record["architecture"], b.record["architecture"]
    names = [n for n in sorted(ours | theirs) if ours.get(n) != theirs.get(n)]
    if names:
        listed = ", ".join(f"{n} {ours.get(n)} and {theirs.get(n)}" for n in names)
        raise UserError(f"{a.path} and {b.path} hold other architectures: {listed}")
    steps = [bundle.record["solver"].get("steps") for bundle in (a, b)]
    if steps[0] != steps[1]:
        raise UserError(
            f"{a.path} was collected with --steps {steps[0]}, {b.path} with "
            f"{steps[1]}; collect one of them again"
        )
    theirs = b.inputs | b.stages
    for name, array in (a.inputs | a.stages).items():
        other = theirs.get(name, array)
        if array.shape != other.shape:
            raise UserError(
                f"{name} is {array.shape} in {a.path}, {other.shape} in {b.path}; "
                "collect both with the same --images"
            )


def read_record(path: Path) -> dict[str, Any]:
    """Reads the JSON part of a bundle, and refuses what is none."""
    try:
        record = parse_json(path.read_text())
    except OSError as error:
        raise UserError(f"{path.parent} is no bundle: it has no {path.name}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON, or ends too early") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is not of the format {FORMAT!r}: collect it again")
    wrong = [n for n, kind in KEYS.items() if not isinstance(record.get(n), kind)]
    if wrong:
        raise UserError(f"{path} has no usable {wrong[0]!r}: collect it again")
    return record


def _read_array(file, name):
    array = file.array(name)
    if array.dtype.kind not in "fiu" or array.ndim < 1:
        raise UserError(f"{file.path}: {name} is {array.dtype} {list(array.shape)}")
    return array
