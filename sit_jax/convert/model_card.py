"""Folders of weights that others load, and the model cards beside exported weights.

Two layouts: diffusers' (DiT alone), and the originals' names in model.safetensors with
our config beside them.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

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
    Comparison,
    compare_tensors,
    flatten_parts,
)
from sit_jax.convert.pretrained import PRETRAINED
from sit_jax.convert.state_dict import read_torch_file
from sit_jax.errors import UserError
from sit_jax.files import read_json, sha256
from sit_jax.models.dit import DiT

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
    *,
    name: str,
    figures: Sequence[Path] = (),
) -> tuple[dict[str, Comparison], list[str]]:
    """Writes a checkpoint's EMA as a folder, and reads it back.

    Args:
      folder: does not exist yet.
      export: the checkpoint.
      layout: one of LAYOUTS.
      name: what the folder will be called.
      figures: JSON files that evaluate.py wrote, for the card.

    Returns:
      the comparison by part with what was read back, and lines to print.
    """
    model, shape = export.spec.model, export.spec.shape
    is_diffusers = layout == "diffusers"
    config = (
        diffusers_config(model, shape)
        if is_diffusers
        else export.weights.meta["config"]
    )
    gap = (
        describe_gap(numeric_gap(model, shape, export.ema())) if is_diffusers else None
    )
    folder.mkdir(parents=True)
    parts = export.state_dicts("ema")
    tensors = to_diffusers_state(parts["ema"]) if is_diffusers else parts["ema"]
    file = folder / (WEIGHTS if is_diffusers else "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensor_files.write(file, tensors)
    del tensors
    written = read_diffusers_folder(folder) if is_diffusers else read_torch_file(file)
    comparisons = compare_tensors(flatten_parts(parts), {"ema": written.ema})
    text = model_card(
        export,
        name=name if is_diffusers else f"{name}/{file.name}",
        shas={file.name: sha256(file)},
        figures=figures,
        diffusers_gap=gap,
    )
    (folder / "README.md").write_text(text)
    return comparisons, [gap] if gap else []


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
    *,
    name: str,
    shas: Mapping[str, str],
    figures: Sequence[Path] = (),
    diffusers_gap: str | None = None,
    is_training_file: bool = False,
) -> str:
    """Returns a model card: Markdown under the Hub's metadata.

    Args:
      export: the checkpoint.
      name: what the weights will be called.
      shas: sha256 by file name.
      figures: JSON files that evaluate.py wrote.
      diffusers_gap: of a folder for diffusers, the sentence about its numbers.
      is_training_file: whether the weights are a dict as the originals' train.py saves.
    """
    from huggingface_hub import ModelCard, ModelCardData

    model, meta, shape = export.spec.model, export.weights.meta, export.spec.shape
    family = type(model).__name__
    flags = ""
    if diffusers_gap is not None:
        loading = DIFFUSERS_LOADING.format(name=name, gap=diffusers_gap)
    else:
        state_dict = f'safetensors.torch.load_file("{name}")'
        if name.endswith(".pt"):
            state_dict = f'torch.load("{name}", weights_only=True)'
            state_dict += '["ema"]' if is_training_file else ""
        arguments = ", ".join(f"{n}={v}" for n, v in _torch_arguments(model, shape))
        loading = TORCH_LOADING.format(
            family=family, arguments=arguments, state_dict=state_dict
        )
        if family in ("SiT", "DiT"):  # a bare file does not tell which
            flags = f" --family {family.lower()} --heads {model.heads}"
    sampling = f"python sample.py --weights {name}{flags} --out samples.png"
    licence, tag = licence_of(meta.get("from"))
    sections = {
        "Architecture": _table(_architecture(model, export.spec)),
        "Origin": _table(_origin(export, shas)),
        "Licence": licence,
        "Loading": f"```python\n{loading}\n```\nor, here:\n```\n{sampling}\n```",
        "Figures": _figures(figures),
        "Training": "The whole config, as sit_jax stores it:\n\n"
        + _json_block(meta["config"]),
    }
    body = (f"## {title}\n\n{text}\n" for title, text in sections.items())
    library = "diffusers" if diffusers_gap is not None else "sit_jax"
    data = ModelCardData(license=tag, library_name=library, tags=[family.lower()])
    content = "\n".join([f"---\n{data.to_yaml()}\n---\n", f"# {name}\n", *body])
    return str(ModelCard(content))


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


def _architecture(model, spec):
    count = sum(math.prod(leaf.shape) for leaf in spec.param_shapes.values())
    names = ("depth", "width", "heads", "patch", "mlp_ratio", "classes", "learn_sigma")
    names += ("decoder", "frequency_shift", "norm2_epsilon")
    own = {field.name for field in dataclasses.fields(model)}
    rows = {"network": type(model).__name__, "trained parameters": f"{count:,}"}
    rows |= {name: getattr(model, name) for name in names if name in own}
    return rows | {"data": " x ".join(map(str, spec.shape))}


def _origin(export, shas):
    meta = export.weights.meta
    rows = {"step": export.weights.step, "item": "the EMA"}
    if "from" in meta:
        rows["converted from"] = meta["from"]
    if "sha256" in meta:
        rows["sha256 of that file"] = meta["sha256"]
    return rows | {f"sha256 of {name}": sha for name, sha in shas.items()}


def _figures(paths):
    blocks = []
    for path in paths:
        try:
            blocks.append(f"`{path.name}`:\n\n{_json_block(read_json(path))}")
        except (OSError, UserError) as error:
            raise UserError(f"--figures {path}: no JSON to read") from error
    return "\n\n".join(blocks) or "None were measured for this export."


def _torch_arguments(model, shape):
    """Arguments of the originals' constructor."""
    height, _, channels = shape
    yield from (("input_size", height), ("patch_size", model.patch))
    yield from (("in_channels", channels), ("hidden_size", model.width))
    yield from (("depth", model.depth), ("num_heads", model.heads))
    yield from (("mlp_ratio", model.mlp_ratio), ("num_classes", model.classes))
    yield "learn_sigma", model.learn_sigma
    if any(field.name == "decoder" for field in dataclasses.fields(model)):
        yield "decode_layer", model.decoder


def _json_block(value):
    return f"```json\n{json.dumps(value, indent=1)}\n```"


def _table(rows):
    lines = (f"| {name} | {value} |" for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *lines])
