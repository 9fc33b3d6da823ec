"""Torch files as checkpoint items, and checkpoints as torch files.

Both ways one stack of layers is converted at a time, the largest first: memory holds
the weights once, and a second copy of what is being converted.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from sit_jax import checkpoint
from sit_jax.config import build, to_json
from sit_jax.convert import diffusers
from sit_jax.convert.infer_config import infer_config, train_args
from sit_jax.convert.optimizer import (
    ADAN,
    AdamState,
    moment_names,
    param_group,
    to_optax,
)
from sit_jax.convert.rules import to_torch
from sit_jax.convert.state_dict import (
    StateDictSpec,
    TorchFile,
    mdt_contents,
    read_torch_file,
    train_content,
)
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment, read_config
from sit_jax.parallel.mesh import device_put_global, replicated
from sit_jax.training.state import ema_rates

_ROLES = ("model", "optimizer")  # of an experiment, which are needed here


@dataclasses.dataclass(frozen=True)
class TorchWeights:
    """An opened torch file, its config, and the state dict that the config asks for."""

    file: TorchFile
    config: Any
    spec: StateDictSpec
    meta = {}  # what a checkpoint's would add

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the parameters, by path."""
        return self.spec.param_shapes

    def leaves(self, item: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (path, array) of item "ema" or "params", the largest first."""
        return self.spec.leaves(self._state(item))

    def load(self, item: str, parts: Any, mesh: jax.sharding.Mesh) -> dict:
        """Returns item "ema" or "params" as parameters, whole on every device."""
        return self.spec.to_params(
            self._state(item), partial(_put, place=replicated(mesh))
        )

    def items(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the items and the meta of a checkpoint of this file."""
        file, adam = self.file, self.file.adam
        put_here = partial(_put, place=jax.local_devices()[0])
        convert = partial(self.spec.to_params, put=put_here)
        items = {"ema": convert(file.ema)}
        is_one = file.model is file.ema
        items["params"] = items["ema"] if is_one else convert(file.model)
        items |= {name: convert(state) for name, state in file.more_emas.items()}
        step = adam.step if adam else 0
        if adam:
            param_group(self.config, step)  # refuses optimizers of another meaning
            tx = build_experiment(self.config, _ROLES).optimizer
            count = put_here(np.asarray(step, np.int32))
            moments = [convert(state) for state in adam.moments.values()]
            items["opt_state"] = to_optax(tx, items["params"], count, moments)
        if drifted := self._drifted_constants():
            items["constants"] = jax.tree.map(put_here, drifted)
        step = step if file.num_updates is None else file.num_updates
        meta = {"config": to_json(self.config), "step": step}
        return items, meta | {"args": file.args, "from": file.path.name}

    def _state(self, item):
        return self.file.model if item == "params" else self.file.ema

    def _drifted_constants(self):
        """Returns the constants of model and ema, None if they are ours bit by bit."""
        ours, file = self.spec.constants, self.file
        theirs = {
            part: {name: np.array(state[name]) for name in ours}
            for part, state in (("model", file.model), ("ema", file.ema))
        }
        expected = dict.fromkeys(theirs, ours)
        is_same = jax.tree.all(jax.tree.map(np.array_equal, theirs, expected))
        return None if is_same else theirs


def open_torch_file(
    path: str | Path,
    base: Callable[[str], Any],
    *,
    family: str | None = None,
    heads: int | None = None,
    config: Any = None,
) -> TorchWeights:
    """Opens a .pt or .safetensors, or a folder of diffusers' DiT.

    Args:
        path: the file or folder.
        base: gives the config of a family into which the file's network is put.
        family: of the network, where the file does not tell it.
        heads: of its attention, likewise.
        config: taken as it is instead of base, and refused if it does not fit.

    Raises:
        UserError: names or shapes are not those of the network.
    """
    is_folder = diffusers.is_diffusers_folder(path)
    file = diffusers.read_diffusers_folder(path) if is_folder else read_torch_file(path)
    config = infer_config(file, base, family=family, heads=heads, config=config)
    spec = StateDictSpec(build(config.model), tuple(config.shape))
    spec.check(path, file.ema)
    if file.model is not file.ema:
        spec.check(path, file.model)
    for name, state in file.more_emas.items():
        spec.check(f"{path}, {name}", state)
    if file.adam and list(file.adam.moments["exp_avg"]) != list(spec.trained):
        raise UserError(f"{path}: opt is not the state of all trained parameters")
    return TorchWeights(file, config, spec)


class CheckpointExport:
    """One step of a checkpoint directory, read as torch tensors.

    Attributes:
        no_optimizer: why a torch file of it cannot hold the optimizer; None if it can.
    """

    def __init__(self, directory: Path, step: int):
        self.directory, self.step = directory, step
        checkpoint.require_intact(directory, step)
        self.meta = checkpoint.read_meta(directory, step)
        if "config" not in self.meta:
            raise UserError(f"{directory}/{step} has no config in its meta")
        if form := self.meta.get("quantized"):
            raise UserError(
                f"{directory}/{step} holds {form['form']} weights, which torch files "
                f"have no place for; convert what it was made from: {self.meta['from']}"
            )
        if "base" in self.meta:
            raise UserError(
                f"{directory}/{step} holds adapters; say what they shall become: "
                "--adapter peft, diffusers or merged"
            )
        self.config = read_config(self.meta["config"])
        self._experiment = build_experiment(self.config, _ROLES)
        self.spec = StateDictSpec(self._experiment.model, self._experiment.shape)
        self._shapes = unflatten_dict(self.spec.param_shapes, sep="/")
        self._moments = moment_names(self._experiment.optimizer, self._shapes)
        self.no_optimizer = self._why_no_optimizer()

    def ema(self) -> dict:
        """Returns the EMA's parameters."""
        return unflatten_dict(dict(self._leaves("ema", self._shapes)), sep="/")

    def tensors(self, *parts: str) -> Iterator[tuple[str, str, np.ndarray]]:
        """Yields (part, torch name, array), a stack of layers at a time.

        Args:
            *parts: model, ema, EMAs at other rates (ema_0.999), the optimizer's moments
                by torch's names, and step, whose one entry is called step.
        """
        emas = ema_rates(self._experiment.ema_decay)
        for part, item in (("model", "params"), *zip(emas, emas, strict=True)):
            if part in parts:
                for name, table in self._constants(part).items():
                    yield part, name, table
                labels = {path: f"{part} {path}" for path in self.spec.param_shapes}
                yield from self._convert(parts, item, self._shapes, labels)
        if {*ADAN, "step"} & set(parts):
            yield from self._convert(parts, "opt_state", *self._optimizer_labels())

    def state_dicts(self, *parts: str) -> dict[str, dict[str, np.ndarray]]:
        """Returns these parts by name, each in torch's order."""
        states = {part: {} for part in parts}
        for part, name, array in self.tensors(*parts):
            states[part][name] = array
        order = ["step", *self.spec.names]
        return {
            part: {name: state[name] for name in order if name in state}
            for part, state in states.items()
        }

    def content(self, bare: bool) -> tuple[Mapping, dict[str, Mapping]]:
        """Returns what a torch file of it holds, and the parts in that.

        Args:
            bare: whether it is the EMA alone, else all that the originals' train.py
                saves.
        """
        if bare:
            parts = self.state_dicts("ema")
            return parts["ema"], parts
        parts = self.state_dicts("model", "ema", *self._moments, "step")
        args = train_args(self.config) | (self.meta.get("args") or {})
        model, ema = parts["model"], parts["ema"]
        return train_content(model, ema, self._adam_state(parts), args), parts

    def mdt_contents(self) -> tuple[dict[str, Mapping], dict[str, Mapping]]:
        """Returns what MDT's train script saves, by file name, and the parts in it."""
        rates = ema_rates(self._experiment.ema_decay)
        has_optimizer, names = self.no_optimizer is None, ["model", *rates]
        names += [*self._moments, "step"] if has_optimizer else []
        parts = self.state_dicts(*names)
        adam = self._adam_state(parts) if has_optimizer else None
        return mdt_contents(self.step, tuple(rates.values()), parts, adam), parts

    def _leaves(self, item, like):
        return checkpoint.iter_leaves(self.directory, self.step, item, like)

    def _adam_state(self, parts):
        step = int(parts["step"]["step"])
        moments = {kind: parts[kind] for kind in self._moments}
        return AdamState(step, moments, param_group(self.config, step))

    def _why_no_optimizer(self):
        if "opt_state" not in checkpoint.items(self.directory, self.step):
            return "the checkpoint has no opt_state"
        try:
            param_group(self.config, self.step)
            self._optimizer_labels()
        except UserError as error:
            return str(error)

    def _optimizer_labels(self):
        """Returns shapes of the optimizer's state, and "PART PATH" of its leaves."""
        tx = self._experiment.optimizer
        trees = [
            unflatten_dict({p: f"{kind} {p}" for p in self.spec.param_shapes}, sep="/")
            for kind in self._moments
        ]
        labels = to_optax(tx, self._shapes, "step step", trees)
        return jax.eval_shape(tx.init, self._shapes), checkpoint.leaves_by_name(labels)

    def _convert(self, parts, item, like, labels):
        rules = {rule[1]: rule for rule in self.spec.rules}
        for place, leaf in self._leaves(item, like):
            part, path = labels[place].split()
            if part not in parts:
                continue
            if part == "step":  # Adam's and a schedule's are the same
                parts = tuple(p for p in parts if p != "step")
                yield part, path, leaf
                continue
            state = to_torch([rules[path]], unflatten_dict({path: leaf}, sep="/"))
            del leaf  # before the next one is read
            for name, array in state.items():
                yield part, name, array

    def _constants(self, part):
        ours = self.spec.constants
        is_stored = "constants" in checkpoint.items(self.directory, self.step)
        if not is_stored or part not in ("model", "ema"):
            return ours
        shape = lambda table: jax.ShapeDtypeStruct(table.shape, table.dtype)
        like = jax.tree.map(shape, {"model": ours, "ema": ours})
        theirs = dict(self._leaves("constants", like))
        return {name: theirs[f"{part}/{name}"] for name in ours}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One part of a conversion, seen from both sides.

    Attributes:
        num_tensors: in the part.
        max_difference: the largest of all numbers.
        left: sha256 over the tensors' names, shapes and bytes, whatever their order.
        right: that of the other side.
    """

    num_tensors: int
    max_difference: float
    left: str
    right: str


def compare_tensors(
    tensors: Iterable[tuple[str, str, np.ndarray]], parts: Mapping[str, Mapping]
) -> dict[str, Comparison]:
    """Compares (part, name, array)s with {part: state dict}, tensor by tensor.

    Raises:
        UserError: a bit differs, or a tensor is missing.
    """
    hashes = {part: ([], []) for part in parts}
    differences = dict.fromkeys(parts, 0.0)
    for part, name, left in tensors:
        right = parts[part][name]
        for lines, array in zip(hashes[part], (left, right), strict=True):
            sha = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
            lines.append(f"{name} {array.shape} {array.dtype} {sha}\n")
        if hashes[part][0][-1] != hashes[part][1][-1]:
            differences[part] = max(differences[part], _max_difference(left, right))
    comparisons = {}
    for part, sides in hashes.items():
        if len(sides[0]) != (count := len(parts[part])):
            raise UserError(f"{part}: {len(sides[0])} tensors came back of {count}")
        left, right = (
            hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
            for lines in sides
        )
        if left != right:
            raise UserError(f"{part} came back different by up to {differences[part]}")
        comparisons[part] = Comparison(count, differences[part], left, right)
    return comparisons


def format_columns(rows: Iterable[Sequence]) -> str:
    """Returns rows of cells as lines, the cells of a column below each other."""
    rows = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=True)
        ).rstrip()
        for row in rows
    )


def _max_difference(left, right):
    if left.shape != right.shape:
        return float("inf")
    difference = np.abs(np.subtract(left, right, dtype=np.float64))
    return float(np.nanmax(difference, initial=0))


def _put(leaf, place):
    """Waits, so that the array that was put can be freed."""
    return jax.block_until_ready(device_put_global(leaf, place))
