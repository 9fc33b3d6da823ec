"""Weights to sample from: a workdir's, a checkpoint's, or those of a torch file."""

import dataclasses
import sys
from functools import partial
from pathlib import Path

import jax

from sit_jax import checkpoint, diffusers_files, releases
from sit_jax.config import from_json
from sit_jax.errors import UserError
from sit_jax.sharding import everywhere, shaped
from sit_jax.tensor_files import KINDS
from sit_jax.training import init_params


@dataclasses.dataclass(frozen=True)
class Directory:
    """One step of a checkpoint directory; its meta holds the config."""

    path: Path
    step: int

    @property
    def config(self):
        meta = checkpoint.read_meta(self.path, self.step)
        if "config" not in meta:
            raise UserError(f"{self.path}/{self.step} has no config in its meta")
        return from_json(meta["config"])

    def load(self, item, parts, mesh):
        """item "ema" or "params" -> the model's parameters, whole on every device."""
        shapes = jax.eval_shape(
            partial(init_params, parts.model, parts.shape), jax.random.key(0)
        )
        where = jax.tree.map(lambda _: everywhere(mesh), shapes)
        target = shaped(shapes, where)
        return checkpoint.load(self.path, self.step, **{item: target})[item]


def open_weights(path, torch_file):
    """-> an object with .config and .load; torch_file(path) opens what torch wrote.

    path: a workdir, checkpoint, .pt, .safetensors or folder of diffusers; also a name
    of releases.RELEASES, or hf:owner/repo/file.
    """
    path = releases.fetch(path)
    if not path.exists():
        names = (
            n
            for n, r in releases.RELEASES.items()
            if r.family not in ("vae", "inception")
        )
        raise UserError(f"no weights at {path}; names are {', '.join(names)}")
    if path.suffix in KINDS or diffusers_files.is_folder(path):
        return torch_file(path)
    found = Directory(*checkpoint.find(path))
    if not checkpoint.has_sums(found.path / str(found.step)):
        line = f"{found.path}/{found.step} has no sums: damage would not be noticed"
        print(line, file=sys.stderr)
    return found
