"""Torch files as weights, and as the items of a checkpoint.

One stack of layers is converted at a time, the largest first: memory holds the weights
once, and a second copy of what is being converted.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from sit_jax.config import build, to_json
from sit_jax.convert import diffusers
from sit_jax.convert.infer_config import infer_config
from sit_jax.convert.optimizer import (
    param_group,
    to_optax,
)
from sit_jax.convert.state_dict import (
    StateDictSpec,
    TorchFile,
    read_torch_file,
)
from sit_jax.errors import UserError
from sit_jax.experiment import Experiment, build_experiment
from sit_jax.parallel.mesh import device_put_global, replicated

ROLES = ("model", "optimizer")  # of an experiment, which are needed here


@dataclasses.dataclass(frozen=True)
class TorchWeights:
    """An opened torch file, its config, and the state dict that the config asks for."""

    file: TorchFile
    config: Any
    spec: StateDictSpec
    meta: ClassVar[dict[str, Any]] = {}  # of a checkpoint; a torch file has none

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the parameters, by path."""
        return self.spec.param_shapes

    def leaves(self, item: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (path, array) of item "ema" or "params", the largest first."""
        return self.spec.leaves(self._state(item))

    def load(self, item: str, experiment: Experiment, mesh: jax.sharding.Mesh) -> dict:
        """Returns item "ema" or "params" as parameters, whole on every device."""
        return self.spec.to_params(
            self._state(item), partial(_put, device=replicated(mesh))
        )

    def items(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the items and the meta of a checkpoint of this file."""
        file, adam = self.file, self.file.adam
        put_here = partial(_put, device=jax.local_devices()[0])
        convert = partial(self.spec.to_params, put=put_here)
        items = {"ema": convert(file.ema)}
        is_one = file.model is file.ema
        items["params"] = items["ema"] if is_one else convert(file.model)
        items |= {name: convert(state) for name, state in file.more_emas.items()}
        step = adam.step if adam else 0
        if adam:
            param_group(self.config, step)  # refuses optimizers of another meaning
            tx = build_experiment(self.config, ROLES).optimizer
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
    *,
    family: str | None = None,
    heads: int | None = None,
    config: Any = None,
) -> TorchWeights:
    """Opens a .pt or .safetensors, or a folder of diffusers' DiT.

    Args:
        path: the file or folder.
        family: of the network, where the file does not tell it.
        heads: of its attention, likewise.
        config: taken as it is instead of the published run's, and refused if it does
            not fit.

    Raises:
        UserError: names or shapes are not those of the network.
    """
    is_folder = diffusers.is_diffusers_folder(path)
    file = diffusers.read_diffusers_folder(path) if is_folder else read_torch_file(path)
    config = infer_config(file, family=family, heads=heads, config=config)
    spec = StateDictSpec(build(config.model), tuple(config.shape))
    spec.check(path, file.ema)
    if file.model is not file.ema:
        spec.check(path, file.model)
    for name, state in file.more_emas.items():
        spec.check(f"{path}, {name}", state)
    if file.adam and list(file.adam.moments["exp_avg"]) != list(spec.trained):
        raise UserError(f"{path}: opt is not the state of all trained parameters")
    return TorchWeights(file, config, spec)


def _put(leaf, device):
    """Waits, so that the array that was put can be freed."""
    return jax.block_until_ready(device_put_global(leaf, device))
