"""Weights to sample from: a workdir's, a checkpoint's, or those of a torch file."""

import dataclasses
import sys
from functools import cached_property, partial
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from sit_jax import checkpoint
from sit_jax.adapters.quantize import quantized_shapes
from sit_jax.adapters.weights import merge_adapters
from sit_jax.config import from_json
from sit_jax.convert import diffusers_files, pretrained
from sit_jax.convert.base import load_adapted
from sit_jax.convert.infer_config import FAMILIES
from sit_jax.convert.tensor_files import SUFFIXES
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment
from sit_jax.files import as_path
from sit_jax.parallel import multihost
from sit_jax.parallel.mesh import replicated, with_shardings
from sit_jax.training.state import init_params


@dataclasses.dataclass(frozen=True)
class Directory:
    """One step of a checkpoint directory; its meta holds the config."""

    path: Path
    step: int

    @cached_property
    def meta(self):
        return checkpoint.read_meta(self.path, self.step)

    @property
    def config(self):
        if "config" not in self.meta:
            raise UserError(f"{self.path}/{self.step} has no config in its meta")
        return from_json(self.meta["config"])

    def shapes(self):
        """Shapes of the parameters as floats, by path."""
        parts = build_experiment(self.config)
        return flatten_dict(_shapes(parts), sep="/")

    def leaves(self, item):
        """Yields (path, float array), the largest first, little of it at a time."""
        like = unflatten_dict(self.shapes(), sep="/")
        return checkpoint.iter_leaves(self.path, self.step, item, like)

    def load(self, item, parts, mesh):
        """item "ema" or "params" -> the model's parameters, whole on every device."""
        if parts.adapter is not None:
            return self._adapted(item, parts, mesh)
        shapes = quantized_shapes(_shapes(parts), self.meta)
        where = jax.tree.map(lambda _: replicated(mesh), shapes)
        target = with_shardings(shapes, where)
        return checkpoint.load(self.path, self.step, **{item: target})[item]

    def _adapted(self, item, parts, mesh):
        """With the adapters of this step merged into their base."""
        params, _ = load_adapted(parts, mesh, self.path, self.step, item)
        params = jax.device_put(params, replicated(mesh))
        return merge_adapters(params)


def _shapes(parts):
    init = partial(init_params, parts.model, parts.shape)
    return jax.eval_shape(init, jax.random.key(0))


def open_weights(path, torch_file):
    """-> an object with .config and .load; torch_file(path) opens what torch wrote.

    path: a workdir, checkpoint, .pt, .safetensors or folder of diffusers; also a name
    of pretrained.PRETRAINED, or hf:owner/repo/file.
    """
    path = pretrained.fetch(path)
    if not path.exists():
        names = (
            n
            for n, r in pretrained.PRETRAINED.items()
            if r.family not in ("vae", "inception")
        )
        raise UserError(
            f"no weights at {path}: no such file or folder, and no release, which is "
            f"downloaded by its name: {', '.join(names)}"
        )
    if path.suffix in SUFFIXES or diffusers_files.is_folder(path):
        return torch_file(path)
    found = Directory(*checkpoint.find_step(path))
    step = found.path / str(found.step)
    same = checkpoint.step_digest(step)
    multihost.assert_equal(f"sums of {step}", same, "all processes need the same step")
    if same is None:
        line = f"{step} has no sums: damage would not be noticed"
        print(line, file=sys.stderr)
    return found


def require_torch(path, family, heads):
    """Refuses --family and --heads beside a folder, which knows both."""
    for flag, value in (("--family", family), ("--heads", heads)):
        if value is not None and as_path(path).is_dir():
            raise UserError(f"{flag} {value}: {path} is no torch file; leave it out")


def family_of(path, given=None):
    """The family of a torch file: as given, or as the name of a release tells."""
    told = getattr(pretrained.find(path), "family", None)
    return given or (told if told in FAMILIES else None)
