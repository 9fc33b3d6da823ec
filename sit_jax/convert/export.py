"""A step of a checkpoint as torch files, and the comparison of what is written.

One stack of layers is converted at a time: memory holds the weights once, and a second
copy of what is being converted.
"""

import argparse
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from sit_jax import checkpoint
from sit_jax.convert.checkpoint import ROLES
from sit_jax.convert.infer_config import train_args
from sit_jax.convert.open import CheckpointWeights
from sit_jax.convert.optimizer import (
    ADAN,
    AdamState,
    moment_names,
    param_group,
    to_optax,
    torch_content,
)
from sit_jax.convert.rules import to_torch
from sit_jax.convert.state_dict import StateDictSpec, mdt_number
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment
from sit_jax.models.mdt import MDT
from sit_jax.training.state import ema_rates


class CheckpointExport:
    """One step of a checkpoint directory, read as torch tensors.

    Attributes:
        weights: the step, as weights.
        spec: the state dict of its network.
        no_optimizer: why a torch file of it cannot hold the optimizer; None if it can.
    """

    def __init__(self, directory: Path, step: int):
        checkpoint.require_intact(directory, step)
        self.weights = CheckpointWeights(directory, step)
        self._config, meta = self.weights.config, self.weights.meta
        if form := meta.get("quantized"):
            raise UserError(
                f"{self} holds {form['form']} weights, which torch files have no place "
                f"for; convert what it was made from: {meta['from']}"
            )
        if "base" in meta:
            raise UserError(
                f"{self} holds adapters; say what they shall become: "
                "--adapter peft, diffusers or merged"
            )
        self._experiment = build_experiment(self._config, ROLES)
        self.spec = StateDictSpec(self._experiment.model, self._experiment.shape)
        self._shapes = unflatten_dict(self.spec.param_shapes, sep="/")
        self._moments = moment_names(self._experiment.optimizer, self._shapes)
        self.no_optimizer = self._why_no_optimizer()

    def __str__(self) -> str:
        return str(self.weights)

    def ema(self) -> dict:
        """Returns the EMA's parameters."""
        return unflatten_dict(dict(self.weights.leaves("ema")), sep="/")

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
        states: dict[str, dict[str, np.ndarray]] = {part: {} for part in parts}
        for part, name, array in self.tensors(*parts):
            states[part][name] = array
        order = ["step", *self.spec.names]
        return {
            part: {name: state[name] for name in order if name in state}
            for part, state in states.items()
        }

    def torch_files(
        self, target: Path
    ) -> tuple[Mapping[str, Mapping], Mapping[str, Mapping], str | None]:
        """Returns what torch files of it hold.

        Args:
            target: the file. For a model010000.pt of an MDT there are more beside it.

        Returns:
            Contents by file name, the parts in them, and what is left out and why.
        """
        why, step = self.no_optimizer, self.weights.step
        if target.suffix == ".safetensors":
            why = "a .safetensors holds one state dict"
        elif step and isinstance(self.spec.model, MDT):
            name = f"model{step - 1:06d}.pt"
            if target.name == name:
                files, parts = self._mdt_files()
                return files, parts, why and f"all but the optimizer, for {why}"
            if mdt_number(target) is not None:
                raise UserError(f"{target}: MDT's file of this step is called {name}")
            why = f"only a {name} has the run's other files beside it"
        if why is not None:
            parts = self.state_dicts("ema")
            return {target.name: parts["ema"]}, parts, f"the EMA alone, for {why}"
        parts = self.state_dicts("model", "ema", *self._moments, "step")
        args = train_args(self._config) | (self.weights.meta.get("args") or {})
        content = {  # what the originals' train.py saves
            "model": parts["model"],
            "ema": parts["ema"],
            "opt": torch_content(self._adam_state(parts), list(parts["model"])),
            "args": argparse.Namespace(**args),
        }
        return {target.name: content}, parts, None

    def _mdt_files(self):
        """Returns what MDT's train script saves, by file name, and the parts in it."""
        emas, number = ema_rates(self._experiment.ema_decay), self.weights.step - 1
        number = f"{number:06d}"
        names = {f"ema_{rate}_{number}.pt": ema for ema, rate in emas.items()}
        names = {f"model{number}.pt": "model"} | names
        has_optimizer = self.no_optimizer is None
        more = [*self._moments, "step"] if has_optimizer else []
        parts = self.state_dicts(*names.values(), *more)
        files = {name: parts[part] for name, part in names.items()}
        if has_optimizer:
            adam = self._adam_state(parts)
            trained = list(adam.moments["exp_avg"])
            files[f"opt{number}.pt"] = torch_content(adam, trained)
        return files, parts

    def _leaves(self, item, like):
        return checkpoint.iter_leaves(self.weights.path, self.weights.step, item, like)

    def _items(self):
        return checkpoint.items(self.weights.path, self.weights.step)

    def _adam_state(self, parts):
        step = int(parts["step"]["step"])
        moments = {kind: parts[kind] for kind in self._moments}
        return AdamState(step, moments, param_group(self._config, step))

    def _why_no_optimizer(self):
        if "opt_state" not in self._items():
            return "the checkpoint has no opt_state"
        try:
            param_group(self._config, self.weights.step)
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
        for stored_path, leaf in self._leaves(item, like):
            part, path = labels[stored_path].split()
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
        is_stored = "constants" in self._items()
        if not is_stored or part not in ("model", "ema"):
            return ours
        shape = lambda table: jax.ShapeDtypeStruct(table.shape, table.dtype)
        like = jax.tree.map(shape, {"model": ours, "ema": ours})
        theirs = dict(self._leaves("constants", like))
        return {name: theirs[f"{part}/{name}"] for name in ours}


def flatten_parts(
    parts: Mapping[str, Mapping],
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yields (part, name, array) of {part: state dict}."""
    for part, state in parts.items():
        for name, array in state.items():
            yield part, name, array


def compare_tensors(
    tensors: Iterable[tuple[str, str, np.ndarray]], parts: Mapping[str, Mapping]
) -> dict[str, str]:
    """Compares (part, name, array)s with {part: state dict}, tensor by tensor.

    Returns:
        The sha256 of each part: of its tensors' names, shapes and bytes, in any order.

    Raises:
        UserError: a bit differs, or a tensor is missing.
    """
    lines: dict[str, list[str]] = {part: [] for part in parts}
    for part, name, array in tensors:
        line = _describe_tensor(name, array)
        if line != _describe_tensor(name, parts[part][name]):
            raise UserError(f"{part}: {name} came back different")
        lines[part].append(line)
    for part, state in parts.items():
        if (count := len(lines[part])) != len(state):
            raise UserError(f"{part}: {count} tensors came back of {len(state)}")
    text = {part: "".join(sorted(lines[part])).encode() for part in parts}
    return {part: hashlib.sha256(text[part]).hexdigest() for part in parts}


def _describe_tensor(name: str, array: np.ndarray) -> str:
    sha = hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
    return f"{name} {array.shape} {array.dtype} {sha}\n"


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
