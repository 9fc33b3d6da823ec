"""Folders of weights that others load, and the model cards beside exported weights.

Two layouts: diffusers' (DiT alone), and the originals' names in model.safetensors with
our config beside them.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sit_jax.convert import tensor_files
from sit_jax.convert.diffusers import (
    WEIGHTS,
    diffusers_config,
    read_diffusers_folder,
    to_diffusers_state,
)
from sit_jax.convert.export import (
    CheckpointExport,
    compare_tensors,
    flatten_parts,
)
from sit_jax.convert.pretrained import PRETRAINED
from sit_jax.convert.state_dict import read_torch_file
from sit_jax.files import sha256, write_json
from sit_jax.models.dit import DiT
from sit_jax.models.mdt import MDT

LAYOUTS = ("diffusers", "released")
TORCH_LOADING = """import argparse, safetensors.torch, torch
from models import {family}  # of the original repository
torch.serialization.add_safe_globals([argparse.Namespace])
network = {family}({arguments})
network.load_state_dict({state_dict}, strict=True)"""
DIFFUSERS_LOADING = """from diffusers import DiTTransformer2DModel
network = DiTTransformer2DModel.from_pretrained("{name}")
# diffusers computes with other frequencies of time and another epsilon than the
# network these weights were trained as: {gap}"""
LICENCE_TAGS = {"MIT": "mit", "Apache-2.0": "apache-2.0"}


def write_model_folder(
    folder: Path,
    export: CheckpointExport,
    layout: str,
    name: str,
    figures: Mapping[str, Any],
) -> str | None:
    """Writes a checkpoint's EMA as a folder, and compares it with what is read back.

    Args:
        folder: does not exist yet.
        export: the checkpoint.
        layout: one of LAYOUTS.
        name: what the folder will be called.
        figures: what evaluate.py wrote, by file name, for the card.

    Returns:
        A sentence on how far diffusers' numbers are from the network's, if it is for
        diffusers.
    """
    model, shape = export.spec.model, export.spec.shape
    config, gap, file = (
        export.weights.meta["config"],
        None,
        folder / "model.safetensors",
    )
    is_diffusers = layout == "diffusers"
    if is_diffusers:
        config, file = diffusers_config(model, shape), folder / WEIGHTS
        gap = describe_gap(numeric_gap(model, shape, export.ema()))
    folder.mkdir(parents=True)
    parts = export.state_dicts("ema")
    write_json(folder / "config.json", config)
    state = to_diffusers_state(parts["ema"]) if is_diffusers else parts["ema"]
    tensor_files.write(file, state)
    del state
    written = read_diffusers_folder(folder) if is_diffusers else read_torch_file(file)
    compare_tensors(flatten_parts(parts), {"ema": written.ema})
    name = name if is_diffusers else f"{name}/{file.name}"
    shas = {file.name: sha256(file)}
    card = model_card(export, name, shas, figures=figures, diffusers_gap=gap)
    (folder / "README.md").write_text(card)
    return gap


def numeric_gap(
    model: DiT,
    shape: tuple[int, int, int],
    params: dict,
    times: tuple[int, ...] = (5, 500, 999),
    seed: int = 0,
) -> dict[int, float]:
    """Returns {time: relative L2 difference} of diffusers' way to compute and DiT's.

    Both ways take the same params, random inputs and labels.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((1, *shape), dtype=np.float32)
    label = rng.integers(model.classes, size=1)
    make = lambda **fields: jax.jit(dataclasses.replace(model, **fields).apply)
    ours = make(frequency_shift=0.0, norm2_epsilon=1e-6)
    theirs = make(frequency_shift=1.0, norm2_epsilon=1e-5)
    gap = {}
    with jax.default_matmul_precision("highest"):
        for t in times:
            inputs = ({"params": params}, x, np.full(1, t, np.float32), label)
            exact = np.asarray(ours(*inputs))
            difference = np.asarray(theirs(*inputs)) - exact
            gap[t] = float(np.linalg.norm(difference) / np.linalg.norm(exact))
    return gap


def describe_gap(gap: Mapping[int, float]) -> str:
    """Returns the sentence about a numeric_gap."""
    by_time = ", ".join(f"{value:.1%} at t={t}" for t, value in gap.items())
    return f"relative L2 difference {by_time}"


def model_card(
    export: CheckpointExport,
    name: str,
    shas: Mapping[str, str],
    *,
    figures: Mapping[str, Any],
    diffusers_gap: str | None = None,
    key: str = "",
) -> str:
    """Returns a model card: Markdown under the Hub's metadata.

    Args:
        export: the checkpoint.
        name: what the weights will be called.
        shas: sha256 by file name.
        figures: what evaluate.py wrote, by file name.
        diffusers_gap: of a folder for diffusers, the sentence about its numbers.
        key: what leads to the state dict in a .pt: ["ema"], or nothing.
    """
    from huggingface_hub import ModelCard, ModelCardData

    model, meta = export.spec.model, export.weights.meta
    family, library, flags = type(model).__name__, "sit_jax", ""
    if diffusers_gap is not None:
        library = "diffusers"
        loading = DIFFUSERS_LOADING.format(name=name, gap=diffusers_gap)
    else:
        state_dict = f'safetensors.torch.load_file("{name}")'
        if name.endswith(".pt"):
            state_dict = f'torch.load("{name}", weights_only=True){key}'
        arguments = original_arguments(model, export.spec.shape)
        loading = TORCH_LOADING.format(
            family=family,
            arguments=", ".join(f"{name}={value}" for name, value in arguments.items()),
            state_dict=state_dict,
        )
        if family in ("SiT", "DiT"):  # a bare file does not tell which
            flags = f" --family {family.lower()} --heads {model.heads}"
    sampling = f"python sample.py --weights {name}{flags} --out samples.png"
    licence, tag = licence_of(meta.get("from"))
    measured = [f"`{path}`:\n\n{_json_block(table)}" for path, table in figures.items()]
    sections = {
        "Architecture": _table(_architecture(export.spec)),
        "Origin": _table(_origin(export, shas)),
        "Licence": licence,
        "Loading": f"```python\n{loading}\n```\nor, here:\n```\n{sampling}\n```",
        "Figures": "\n\n".join(measured) or "None were measured for this export.",
        "Training": "The whole config, as sit_jax stores it:\n\n"
        + _json_block(meta["config"]),
    }
    body = (f"## {title}\n\n{text}\n" for title, text in sections.items())
    data = ModelCardData(license=tag, library_name=library, tags=[family.lower()])
    return str(
        ModelCard("\n".join([f"---\n{data.to_yaml()}\n---\n", f"# {name}\n", *body]))
    )


def licence_of(source: str | None) -> tuple[str, str | None]:
    """Returns a sentence on weights from a file of this name, and the Hub's tag.

    source: None of weights that were trained here.
    """
    if source is None:
        return "Trained with sit_jax: whoever trained them decides.", None
    for release in PRETRAINED.values():
        if release.source.rpartition("/")[2] == source:
            tag = LICENCE_TAGS.get(release.licence, "cc-by-nc-4.0")
            line = f"Converted from `{source}`, whose licence is {release.licence}."
            return line, tag
    return f"Converted from `{source}`: the licence of that file holds.", None


def _architecture(spec):
    count = sum(math.prod(shape) for shape in spec.trained.values())
    rows = {"network": type(spec.model).__name__, "trained parameters": f"{count:,}"}
    fields = ("depth", "width", "heads", "patch", "mlp_ratio", "classes", "learn_sigma")
    fields += ("decoder", "frequency_shift", "norm2_epsilon")
    own = {field.name for field in dataclasses.fields(spec.model)}
    rows |= {name: getattr(spec.model, name) for name in fields if name in own}
    return rows | {"data": " x ".join(map(str, spec.shape))}


def _origin(export, shas):
    meta = export.weights.meta
    rows = {"step": export.weights.step, "item": "the EMA"}
    if "from" in meta:
        rows["converted from"] = meta["from"]
    if "sha256" in meta:
        rows["sha256 of that file"] = meta["sha256"]
    return rows | {f"sha256 of {name}": sha for name, sha in shas.items()}


def original_arguments(model: DiT | MDT, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns the arguments of the original's constructor for a network."""
    arguments = {
        "input_size": shape[0],
        "patch_size": model.patch,
        "in_channels": shape[2],
        "hidden_size": model.width,
        "depth": model.depth,
        "num_heads": model.heads,
        "mlp_ratio": model.mlp_ratio,
        "num_classes": model.classes,
        "learn_sigma": model.learn_sigma,
    }
    decoder = {"decode_layer": model.decoder} if isinstance(model, MDT) else {}
    return arguments | decoder


def _json_block(value):
    return f"```json\n{json.dumps(value, indent=1)}\n```"


def _table(rows):
    lines = (f"| {name} | {value} |" for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *lines])
