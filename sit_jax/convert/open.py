"""Opens weights: of a workdir, a checkpoint, a torch file, diffusers, or by a name.

Also the weights that adapters belong to. A checkpoint of adapters holds nothing of its
base: its meta says where the base was, and the sha256 of its weights. What is found
there is compared with that.

What is opened builds only what a stored config says of the network and its sampling
(experiment.SAMPLING), never data sources, optimizers or references.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from sit_jax import checkpoint
from sit_jax.adapters.quantize import quantized_shapes
from sit_jax.adapters.weights import join, merge_adapters, split_trainable
from sit_jax.config import difference, from_json, to_json
from sit_jax.convert import pretrained
from sit_jax.convert.checkpoint import open_torch_file
from sit_jax.convert.diffusers import is_diffusers_folder
from sit_jax.convert.infer_config import FAMILIES
from sit_jax.convert.tensor_files import SHARDED, SUFFIXES
from sit_jax.errors import UserError
from sit_jax.experiment import Experiment, build_experiment, read_config
from sit_jax.files import as_path
from sit_jax.manifest import weights_hash
from sit_jax.parallel import multihost
from sit_jax.parallel.mesh import device_put_global, replicated, with_shardings
from sit_jax.parallel.sharding_rules import weight_shardings
from sit_jax.ranges import COUNT
from sit_jax.training.state import init_params

# Fields of a network that adapters may be trained with at other values.
FREE_FIELDS = ("remat", "unroll", "dtype", "mask_ratio", "mask_ratio_range")


class LoadedWeights(Protocol):
    """Opened weights, of which nothing is in memory yet."""

    @property
    def config(self) -> ConfigDict:
        """The config of the run."""

    @property
    def meta(self) -> dict[str, Any]:
        """The meta of the checkpoint, empty for a torch file."""

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the parameters as floats, by path."""

    def leaves(self, item: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (path, float array), the largest first, little of it at a time."""

    def load(self, item: str, experiment: Experiment, mesh: jax.sharding.Mesh) -> dict:
        """Returns item "ema" or "params" as parameters, whole on every device."""


@dataclasses.dataclass(frozen=True)
class CheckpointWeights:
    """LoadedWeights of one step of a checkpoint directory."""

    path: Path
    step: int

    def __str__(self) -> str:
        return f"{self.path}/{self.step}"

    @cached_property
    def meta(self) -> dict[str, Any]:
        """The step's meta."""
        return checkpoint.read_meta(self.path, self.step)

    @property
    def config(self) -> ConfigDict:
        """The config in the meta."""
        if "config" not in self.meta:
            raise UserError(f"{self} has no config in its meta")
        return read_config(self.meta["config"])

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of the parameters as floats, by path."""
        experiment = build_experiment(self.config, roles=("model",))
        return flatten_dict(_param_shapes(experiment.model, experiment.shape), sep="/")

    def leaves(self, item: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (path, float array), the largest first, little of it at a time."""
        like = unflatten_dict(self.shapes(), sep="/")
        return checkpoint.iter_leaves(self.path, self.step, item, like)

    def load(self, item: str, experiment: Experiment, mesh: jax.sharding.Mesh) -> dict:
        """Returns item "ema" or "params" as parameters, whole on every device.

        Adapters are merged into their base.
        """
        if experiment.adapter is not None:
            params, _ = load_adapted(experiment, mesh, self, item)
            return merge_adapters(jax.device_put(params, replicated(mesh)))
        shapes = _param_shapes(experiment.model, experiment.shape)
        shapes = quantized_shapes(shapes, self.meta)
        shardings = jax.tree.map(lambda _: replicated(mesh), shapes)
        target = with_shardings(shapes, shardings)
        return checkpoint.load(self.path, self.step, **{item: target})[item]


@dataclasses.dataclass(frozen=True)
class WeightsRef:
    """Weights that a flag names, with what a bare file of them does not tell.

    Args:
      path: a workdir, checkpoint, .pt, .safetensors or folder of diffusers; also a name
        of pretrained.PRETRAINED, or hf:owner/repo/file. None: no weights.
      weights_only: of a training run: without its optimizer.
      family: of a bare torch file.
      heads: of a bare torch file whose width is not a published one.
    """

    path: str | None = None
    weights_only: bool = False
    family: str | None = None
    heads: int | None = None

    def open(self) -> LoadedWeights:
        """Opens the weights.

        Raises:
          UserError: there is nothing at the path, or nothing that can be read; family
            or heads are given beside a folder, which has both.
        """
        source = str(self.path)
        for flag, value in (("--family", self.family), ("--heads", self.heads)):
            if value is not None and as_path(source).is_dir():
                raise UserError(
                    f"{flag} {value}: {source} is no torch file; leave it out"
                )
        path = pretrained.fetch(source)
        if not path.exists():
            releases = pretrained.PRETRAINED.items()
            names = (n for n, r in releases if r.family not in ("vae", "inception"))
            raise UserError(
                f"no weights at {path}: no such file or folder, and no release, which "
                f"is downloaded by its name: {', '.join(names)}"
            )
        if path.name.endswith((*SUFFIXES, SHARDED)) or is_diffusers_folder(path):
            family = family_of(source, self.family)
            return open_torch_file(path, family=family, heads=self.heads)
        weights = CheckpointWeights(*checkpoint.find_step(path))
        step = weights.path / str(weights.step)
        digest = checkpoint.step_digest(step)
        remedy = "all processes need the same step"
        multihost.assert_equal(f"sums of {step}", digest, remedy)
        if digest is None:
            line = f"{step} has no sums: damage would not be noticed"
            print(line, file=sys.stderr)
        return weights


def add_init_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --init and what goes with it."""
    add = parser.add_argument_group("weights to begin with").add_argument
    add("--init", metavar="PATH", help="workdir, checkpoint, .pt ... or a name")
    add("--weights-only", action="store_true", help="no optimizer: begin at step 0")
    add_torch_flags(add)


def add_torch_flags(add: Callable[..., Any]) -> None:
    """Adds what a bare file does not tell; add: add_argument of a parser or group."""
    add("--family", choices=FAMILIES, help="of a bare .pt or .safetensors")
    line = "of a bare file whose width is not a published one"
    add("--heads", type=COUNT, metavar="N", help=line)


def family_of(path: str | Path, family: str | None = None) -> str | None:
    """Returns the family given, or that of a published name."""
    release = pretrained.find(path)
    published = release.family if release is not None else None
    return family or (published if published in FAMILIES else None)


def load_base(
    experiment: Experiment,
    mesh: jax.sharding.Mesh,
    path: str | Path,
    record: dict[str, Any] | None = None,
) -> tuple[dict, dict[str, Any]]:
    """Loads the EMA of a workdir or checkpoint for adapters over it.

    Args:
      experiment: has an adapter.
      mesh: of the run.
      path: where the base is.
      record: one that the weights must agree with.

    Returns:
      the weights, and their record: path, step and sha256.

    Raises:
      UserError: it is another network or has other weights than the record's.
    """
    shapes = base_shapes(experiment)
    require_checkpoint(path)
    directory, step = checkpoint.find_step(path)
    if record and str(directory) == record["path"]:
        step = record["step"]
    meta = checkpoint.read_meta(directory, step)
    if "base" in meta:
        raise UserError(
            f"{path} holds adapters of {meta['base']['path']}, no network; merge them "
            f"first: port_weights.py {path} DIR --adapter merged"
        )
    form = meta.get("quantized", {}).get("form")
    if form == "w8a8":
        raise UserError(f"{path} is w8a8, through which no gradient goes: take w8, w4")
    if form and experiment.adapter.int8:
        raise UserError(f"{path} is {form} already: leave out adapter.int8")
    if "config" in meta:
        _require_same_network(path, from_json(meta["config"]).model, experiment)
    shapes = quantized_shapes(shapes, meta)
    shardings = readable = weight_shardings(mesh, shapes)
    if not all(s.is_fully_addressable for s in jax.tree.leaves(shardings)):
        # each process needs all of it for the hash
        cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        readable = jax.tree.map(lambda _: cpu, shapes)
    target = with_shardings(shapes, readable)
    params = checkpoint.load(directory, step, ema=target)["ema"]
    sha256 = weights_hash(params)
    if record and record["sha256"] != sha256:
        raise UserError(
            f"{directory}/{step} is not the base of these adapters: its weights are "
            f"{sha256[:12]}, theirs were {record['sha256'][:12]} in {record['path']}"
        )
    params = device_put_global(params, shardings)
    return params, {"path": str(directory), "step": step, "sha256": sha256}


def require_checkpoint(path: str | Path) -> None:
    """Refuses a published name or a torch file, with what makes a checkpoint of it."""
    if pretrained.find(path) or str(path).endswith((*SUFFIXES, SHARDED)):
        raise UserError(
            f"{path} is no checkpoint, which adapters need below them: make one with "
            f"port_weights.py {path} DIR, or quantize.py {path} DIR for int8 (QLoRA)"
        )


def base_shapes(experiment: Experiment) -> dict:
    """Returns the parameter shapes of the network, below its adapter if it has one."""
    new = 0 if experiment.adapter is None else experiment.adapter.new_classes
    classes = experiment.model.classes - new
    if classes < 1:
        raise UserError(
            f"model.classes is {experiment.model.classes}, all of them new: adapter."
            f"new_classes is {new}; model.classes counts both"
        )
    return _param_shapes(experiment.model.clone(classes=classes), experiment.shape)


def adapter_shapes(experiment: Experiment) -> dict:
    """Returns the shapes of what a checkpoint of adapters holds as params."""
    add = partial(experiment.adapter.add_adapters, key=jax.random.key(0))
    return split_trainable(jax.eval_shape(add, base_shapes(experiment)))[0]


def load_adapted(
    experiment: Experiment,
    mesh: jax.sharding.Mesh,
    weights: CheckpointWeights,
    item: str,
    base: str | Path | None = None,
) -> tuple[dict, dict[str, Any]]:
    """Loads the adapters of a checkpoint over their base.

    Args:
      experiment: of the checkpoint.
      mesh: of the run.
      weights: the checkpoint.
      item: "ema" or "params".
      base: where the base is now, if not where it was.

    Returns:
      the parameters, and the base's record.
    """
    record = weights.meta["base"]
    params, record = load_base(experiment, mesh, base or record["path"], record)
    shapes = adapter_shapes(experiment)
    target = with_shardings(shapes, weight_shardings(mesh, shapes))
    trained = checkpoint.load(weights.path, weights.step, **{item: target})[item]
    adapter = experiment.adapter
    over = adapter.add_adapters(adapter.quantize_base(params), jax.random.key(0))
    return join(trained, split_trainable(over)[1]), record


def _param_shapes(model, shape):
    init = partial(init_params, model, shape)
    return jax.eval_shape(init, jax.random.key(0))


def _require_same_network(path, base_spec, experiment):
    """Refuses a base whose network is not the config's, down to the heads."""
    model, new = experiment.model, experiment.adapter.new_classes
    theirs = to_json(base_spec)
    names = {field.name for field in dataclasses.fields(model)} & set(theirs)
    ours = {name: to_json(getattr(model, name)) for name in names}
    ours["make"] = to_json(type(model))
    ignored = {*FREE_FIELDS, "classes"}
    compared = lambda fields: {n: v for n, v in fields.items() if n not in ignored}
    unlike = difference(compared(theirs), compared(ours))
    if theirs["classes"] != model.classes - new:
        if new and not unlike:
            raise UserError(
                f"{path} has {theirs['classes']} classes and the data {model.classes}: "
                f"that makes {model.classes - theirs['classes']} new ones, but "
                f"adapter.new_classes is {new}"
            )
        unlike.append(("classes", theirs["classes"], model.classes - new))
    if unlike:
        lines = "; ".join(f"model.{name} is {a}, not {b}" for name, a, b in unlike)
        raise UserError(f"{path} holds another network: {lines}")
