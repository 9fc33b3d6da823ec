"""Torch files as configs and checkpoint items, and checkpoints as torch files.

Both ways a stack of layers is converted at a time, the largest first: one half-done
conversion holds the weights once, and of what is being converted a second copy.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from sit_jax import checkpoint
from sit_jax.config import build, from_json, to_json
from sit_jax.convert import diffusers_files, mdt_files, moments, torch_files
from sit_jax.convert.infer_config import args_of, config_of, group_of
from sit_jax.convert.released import Released, nest
from sit_jax.convert.rules import to_torch
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment
from sit_jax.parallel.mesh import device_put_global, replicated
from sit_jax.training.state import ema_item_names

OPTIMIZED = ("model", "optimizer")

OPTIMIZED = ("model", "optimizer")

OPTIMIZED = ("model", "optimizer")

OPTIMIZED = ("model", "optimizer")


@dataclasses.dataclass(frozen=True)
class TorchWeights:
    """An opened torch file and the config that it has told of."""

    file: torch_files.TorchFile
    config: Any
    released: Released
    meta = {}  # what a checkpoint's would add

    def shapes(self):
        """Shapes of the parameters, by path."""
        return self.released.params

    def leaves(self, item):
        """Yields (path, array) of item "ema" or "params", the largest first."""
        state = self.file.model if item == "params" else self.file.ema
        return self.released.leaves(state)

    def load(self, item, parts, mesh):
        """item "ema" or "params" -> the model's parameters, whole on every device."""
        state = self.file.model if item == "params" else self.file.ema
        return self.released.tree(state, partial(_put, place=replicated(mesh)))

    def items(self):
        """-> the items and the meta of a checkpoint."""
        file, adam = self.file, self.file.adam
        put = partial(_put, place=jax.local_devices()[0])
        tree = partial(self.released.tree, put=put)
        items = {"ema": tree(file.ema)}
        items["params"] = items["ema"] if file.model is file.ema else tree(file.model)
        items |= {name: tree(state) for name, state in file.averages.items()}
        step = adam.step if adam else 0
        if adam:
            group_of(self.config, step)  # refuses optimizers that mean something else
            trees = [tree(moment) for moment in adam.moments.values()]
            tx = build_experiment(self.config, OPTIMIZED).optimizer
            count = device_put_global(np.asarray(step, np.int32))
            items["opt_state"] = moments.place(tx, items["params"], count, *trees)
        step = step if file.updates is None else file.updates
        if drifted := self._drifted():
            items["constants"] = jax.tree.map(put, drifted)
        meta = {"config": to_json(self.config), "step": step}
        return items, meta | {"args": file.args, "from": file.path.name}

    def _drifted(self):
        """The constants of model and ema, if they are not ours to the last bit."""
        ours = self.released.constants
        theirs = {
            part: {name: np.array(state[name]) for name in ours}
            for part, state in (("model", self.file.model), ("ema", self.file.ema))
        }
        same = all(
            np.array_equal(state[name], ours[name])
            for state in theirs.values()
            for name in ours
        )
        return None if same else theirs


def open_torch(path, base, family=None, heads=None, config=None):
    """-> TorchWeights of a .pt or .safetensors, or of a folder of diffusers' DiT.

    base(family) gives the config in which the file's network takes the place of the
    published one; a given config is kept as it is, and refused if it does not fit.
    Names and shapes are checked.
    """
    in_folder = diffusers_files.is_folder(path)
    file = diffusers_files.read(path) if in_folder else mdt_files.read(path)
    config = config_of(file, base, family, heads, config)
    released = Released(build(config.model), tuple(config.shape))
    released.check(path, file.ema)
    if file.model is not file.ema:
        released.check(path, file.model)
    for name, state in file.averages.items():
        released.check(f"{path}, {name}", state)
    if file.adam and list(file.adam.exp_avg) != list(released.trained):
        raise UserError(f"{path}: opt is not the state of all trained parameters")
    return TorchWeights(file, config, released)


class Stored:
    """One step of a checkpoint directory, seen as torch tensors."""

    def __init__(self, directory, step):
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
        self.config = from_json(self.meta["config"])
        self._experiment = build_experiment(self.config, OPTIMIZED)
        self.released = Released(self._experiment.model, self._experiment.shape)
        self.no_moments = self._no_moments()

    def ema(self):
        """The averaged parameters."""
        shapes = nest(self.released.params)
        return nest(
            dict(checkpoint.iter_leaves(self.directory, self.step, "ema", shapes))
        )

    def _no_moments(self):
        """Why a torch file of this step cannot hold the optimizer; None if it can."""
        if "opt_state" not in checkpoint.items(self.directory, self.step):
            return "the checkpoint has no opt_state"
        try:
            group_of(self.config, self.step)
            self._moments()
        except UserError as error:
            return str(error)

    def _moments(self):
        """-> shapes of the optimizer's state, and "PART PATH" by name of the leaf."""
        tx, shapes = self._experiment.optimizer, nest(self.released.params)
        trees = (
            nest({path: f"{part} {path}" for path in self.released.params})
            for part in self._kinds()
        )
        labels = moments.place(tx, shapes, "step step", *trees)
        return jax.eval_shape(tx.init, shapes), checkpoint.leaves_by_name(labels)

    def _kinds(self):
        return moments.names(self._experiment.optimizer, nest(self.released.params))

    def tensors(self, *parts):
        """Yields (part, torch name, array) for the parts asked for, a stack at a time.

        Parts are model, ema and averages at other rates, the optimizer's moments by
        torch's names, and step with the one entry "step".
        """
        shapes = nest(self.released.params)
        items = ema_item_names(self._experiment.ema_decay)
        for part, item in (("model", "params"), *zip(items, items, strict=True)):
            if part in parts:
                yield from ((part, *each) for each in self._constants(part).items())
                labels = {path: f"{part} {path}" for path in self.released.params}
                yield from self._converted(parts, item, shapes, labels)
        if {*torch_files.ADAN, "step"} & set(parts):
            yield from self._converted(parts, "opt_state", *self._moments())

    def content(self, bare):
        """-> what torch_files.write takes, and the parts in it with their tensors."""
        if bare:
            found = self._gathered("ema")
            return found["ema"], found
        found = self._gathered("model", "ema", *self._kinds(), "step")
        step = int(found["step"]["step"])
        group = group_of(self.config, step)
        adam = torch_files.Adam(step, found["exp_avg"], found["exp_avg_sq"], group)
        args = args_of(self.config) | (self.meta.get("args") or {})
        model, ema = found["model"], found["ema"]
        return torch_files.train_layout(model, ema, adam, args), found

    def run_of_mdt(self):
        """-> {name: content} of what MDT's train script saves, and the parts."""
        decay, group = self._experiment.ema_decay, None
        wanted = ["model", *ema_item_names(decay)]
        if self.no_moments is None:
            wanted += [*self._kinds(), "step"]
        found = self._gathered(*wanted)
        if self.no_moments is None:
            group = group_of(self.config, int(found["step"]["step"]))
        rates = decay if isinstance(decay, tuple) else (decay,)
        return mdt_files.layout(self.step, rates, found, group), found

    def _gathered(self, *parts):
        """-> {part: state dict in torch's order}"""
        found = {part: {} for part in parts}
        for part, name, array in self.tensors(*parts):
            found[part][name] = array
        names = self.released.names
        for part in set(parts) - {"step"}:
            found[part] = {n: found[part][n] for n in names if n in found[part]}
        return found

    def _converted(self, parts, item, like, labels):
        rules = {path: (torch, path, how) for torch, path, how in self.released.rules}
        for at, leaf in checkpoint.iter_leaves(self.directory, self.step, item, like):
            part, path = labels[at].split()
            if part not in parts:
                continue
            if part == "step":  # Adam's and a schedule's are the same
                parts = tuple(p for p in parts if p != "step")
                yield part, path, leaf
                continue
            state = to_torch([rules[path]], nest({path: leaf}))
            del leaf  # before the next one is read
            yield from ((part, name, array) for name, array in state.items())

    def _constants(self, part):
        ours = self.released.constants
        if "constants" not in checkpoint.items(self.directory, self.step):
            return ours
        like = {"model": ours, "ema": ours}
        if part not in like:
            return ours
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        found = dict(
            checkpoint.iter_leaves(self.directory, self.step, "constants", like)
        )
        return {name: found[f"{part}/{name}"] for name in ours}


def _put(leaf, place):
    """Waits, so that the array that was put can be freed."""
    return jax.block_until_ready(device_put_global(leaf, place))
