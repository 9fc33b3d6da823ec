"""A portable folder of what one machine computed for a few images: JSON and arrays.

Two of them, from whatever machines, are held against each other by ladder.py. Nothing
but numpy is needed to write one: see FORMAT, FILES and Bundle.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from sit_jax.errors import UserError
from sit_jax.files import as_path, atomic_write, local_path, parse_json
from sit_jax.sampling.outputs import ArrayFile

FORMAT = "sit_jax bundle 1"
FILES = ("bundle.json", "arrays.npz")
FEATURES = "features.npz"
INPUTS = ("noise", "t", "labels")
KEYS = {  # of bundle.json, and what each must be
    "manifest": dict,  # of the samples, as sample.py writes it
    "architecture": dict,
    "weights": dict,  # tensor: sha256
    "precision": dict,  # the probe's bits, and the words
    "environment": dict,  # of the machine that collected
    "solver": dict,  # of the fixed grid: steps, evaluations
    "stages": list,  # names, in the order in which they are computed
}
MAYBE = "evaluation"  # the pipeline of features among the stages, if there are any


@dataclasses.dataclass(frozen=True)
class Bundle:
    """record: KEYS; inputs: INPUTS, noise [n, H, W, C]; stages: {name: [n, ...]}."""

    path: Path
    record: dict
    inputs: dict
    stages: dict

    @property
    def features(self):
        """Path of the samples' features, or None."""
        path = self.path / FEATURES
        return path if path.is_file() else None


def is_bundle(path):
    return (Path(path) / FILES[0]).is_file()


def write(bundle, features=None):
    """Writes a Bundle to its path, whole or not at all; features: an .npz to keep."""
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


def read(path):
    """-> Bundle; what is no bundle, or not whole, is refused."""
    path = local_path(path)
    record = _record(path / FILES[0])
    file = ArrayFile(path / FILES[1])
    inputs = {name: _array(file, f"input {name}") for name in INPUTS}
    stages = {
        name: _array(file, f"stage {i}") for i, name in enumerate(record["stages"])
    }
    count = {len(array) for array in (*inputs.values(), *stages.values())}
    if len(count) != 1:
        raise UserError(f"{path} holds arrays of {sorted(count)} images: collect again")
    return Bundle(path, record, inputs, stages)


def require_same_network(a, b):
    """Refuses bundles whose stages cannot stand beside each other."""
    one, other = a.record["architecture"], b.record["architecture"]
    odd = [n for n in sorted(one | other) if one.get(n) != other.get(n)]
    if odd:
        listed = ", ".join(f"{n} {one.get(n)} and {other.get(n)}" for n in odd)
        raise UserError(f"{a.path} and {b.path} hold other architectures: {listed}")
    sizes = (len(a.inputs["noise"]), len(b.inputs["noise"]))
    steps = tuple(each.record["solver"].get("steps") for each in (a, b))
    for flag, pair in (("--images", sizes), ("--steps", steps)):
        if pair[0] != pair[1]:
            raise UserError(
                f"{a.path} was collected with {flag} {pair[0]}, {b.path} with "
                f"{pair[1]}; collect one of them again"
            )
    for name in a.stages.keys() & b.stages.keys():
        shapes = a.stages[name].shape, b.stages[name].shape
        if shapes[0] != shapes[1]:
            raise UserError(
                f"stage {name!r} is {shapes[0]} in {a.path}, {shapes[1]} in {b.path}: "
                "other architectures"
            )


def _record(path):
    try:
        record = parse_json(path.read_text())
    except OSError as error:
        raise UserError(f"{path.parent} is no bundle: it has no {path.name}") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON, or ends too early") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise UserError(f"{path} is not of the format {FORMAT!r}: collect it again")
    odd = [n for n, kind in KEYS.items() if not isinstance(record.get(n), kind)]
    if odd:
        raise UserError(f"{path} has no usable {odd[0]!r}: collect it again")
    return record


def _array(file, name):
    array = file.array(name)
    if array.dtype.kind not in "fiu" or array.ndim < 1:
        raise UserError(f"{file.path}: {name} is {array.dtype} {list(array.shape)}")
    return array
