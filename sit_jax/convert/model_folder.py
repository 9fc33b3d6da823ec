"""A checkpoint's averaged weights as a folder that others load, with a model card.

Two layouts: diffusers' (DiT alone), and the released names in model.safetensors with
our config beside them.
"""

import dataclasses
import json

import jax
import numpy as np

from sit_jax.convert import diffusers_files, tensor_files
from sit_jax.convert.card import card
from sit_jax.convert.checkpoint import compare_tensors
from sit_jax.convert.state_dict import read_torch_file
from sit_jax.errors import UserError
from sit_jax.files import sha256
from sit_jax.models.dit import DiT, SiT

LAYOUTS = ("diffusers", "released")


def write(folder, stored, layout, name, figures=()):
    """Writes the folder -> {part: Comparison} of what was read back, lines to print.

    name: what the folder will be called; figures: see card.
    """
    folder.mkdir(parents=True)
    content, parts = stored.content(bare=True)
    lines, words = [], None
    if layout == "diffusers":
        words = _require_dit(stored)
        lines.append(words)
        config = diffusers_files.config_of(stored.spec.model, stored.spec.shape)
        tensors, file = diffusers_files.named(content), diffusers_files.WEIGHTS[0]
    else:
        config, tensors, file = stored.meta["config"], content, "model.safetensors"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensor_files.write(folder / file, tensors)
    del tensors
    read = diffusers_files.read(folder) if layout == "diffusers" else None
    written = read or read_torch_file(folder / file)
    each = ((p, n, array) for p in parts for n, array in parts[p].items())
    found = compare_tensors(each, {part: written.ema for part in parts})
    shas = {file: sha256(folder / file)}
    snippet = "diffusers" if layout == "diffusers" else "torch"
    text = card(stored, _shown(name, file, layout), snippet, shas, figures, words)
    (folder / "README.md").write_text(text)
    return found, lines


def gap(model, shape, params, times=(5, 500, 999), seed=0):
    """-> {time: relative L2 difference} of diffusers' way to compute and DiT's.

    params: with random inputs of this shape and their own labels.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, *shape), dtype=np.float32)
    label = rng.integers(model.classes, size=1)
    ways = [
        dataclasses.replace(model, frequency_shift=shift, norm2_epsilon=epsilon)
        for shift, epsilon in ((0.0, 1e-6), (1.0, 1e-5))
    ]
    found = {}
    with jax.default_matmul_precision("highest"):
        for t in times:
            at = (x, np.full(1, t, np.float32), label)
            ours, theirs = (
                np.asarray(jax.jit(way.apply)({"params": params}, *at)) for way in ways
            )
            found[t] = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
    return found


def told(found):
    """The sentence about a gap()."""
    each = ", ".join(f"{value:.1%} at t={t}" for t, value in found.items())
    return f"relative L2 difference {each}"


def _require_dit(stored):
    """-> the sentence about diffusers' numbers; refuses what it has no class for."""
    model = stored.spec.model
    if not isinstance(model, DiT) or isinstance(model, SiT):
        raise UserError(
            f"diffusers has no class for a {type(model).__name__}; "
            "--to released writes a folder with a loader"
        )
    return told(gap(model, stored.spec.shape, stored.ema()))


def _shown(name, file, layout):
    return name if layout == "diffusers" else f"{name}/{file}"
