"""Model cards: what tells of exported weights how they came about and are loaded."""

import json
import math

from sit_jax.convert.pretrained import PRETRAINED
from sit_jax.errors import UserError

LOADING = {
    "torch": """import safetensors.torch, torch
from models import {family}  # of the original repository
network = {family}({arguments})
network.load_state_dict({read}, strict=True)""",
    "diffusers": """from diffusers import DiTTransformer2DModel
network = DiTTransformer2DModel.from_pretrained("{name}")
# diffusers computes with other frequencies of time and another epsilon than the
# network these weights were trained as: {gap}""",
    "sit_jax": "python sample.py --weights {name}{family} --out samples.png",
}


def card(stored, name, snippet, shas, figures=(), gap=None):
    """-> Markdown for weights called `name`, of an exchange.Stored.

    snippet: a key of LOADING; shas: {file name: sha256}; figures: paths of what
    evaluate.py wrote; gap: the sentence for diffusers.
    """
    model, meta = stored.spec.model, stored.meta
    family = type(model).__name__
    loading = LOADING[snippet].format(
        family=family,
        name=name,
        arguments=_arguments(model, stored),
        gap=gap,
        read=_reader(name),
    )
    ours = LOADING["sit_jax"].format(name=name, family=_flags(model, snippet))
    sections = {
        "Architecture": _table(_architecture(model, stored)),
        "Origin": _table(_origin(stored, shas)),
        "Licence": licence(meta.get("from")),
        "Loading": f"```python\n{loading}\n```\nor, here:\n```\n{ours}\n```",
        "Figures": _figures(figures),
        "Training": _training(stored),
    }
    body = (f"## {title}\n\n{text}\n" for title, text in sections.items())
    return "\n".join([f"# {name}\n", *body])


def licence(source):
    """A sentence on weights from a file called `source`, None: trained here."""
    if source is None:
        return "Trained with sit_jax: whoever trained them decides."
    for release in PRETRAINED.values():
        if release.source.rpartition("/")[2] == source:
            return f"Converted from `{source}`, whose licence is {release.licence}."
    return f"Converted from `{source}`: the licence of that file holds."


def _architecture(model, stored):
    count = sum(math.prod(leaf.shape) for leaf in stored.spec.param_shapes.values())
    fields = ("depth", "width", "heads", "patch", "mlp_ratio", "classes", "learn_sigma")
    more = ("decoder", "frequency_shift", "norm2_epsilon")
    shown = [f for f in (*fields, *more) if hasattr(model, f)]
    rows = {"network": type(model).__name__, "trained parameters": f"{count:,}"}
    rows |= {field: getattr(model, field) for field in shown}
    return rows | {"data": " x ".join(map(str, stored.spec.shape))}


def _origin(stored, shas):
    meta = stored.meta
    rows = {"step": stored.step, "item": "the average (EMA)"}
    if "from" in meta:
        rows["converted from"] = meta["from"]
    if "sha256" in meta:
        rows["sha256 of that file"] = meta["sha256"]
    return rows | {f"sha256 of {name}": sha for name, sha in shas.items()}


def _training(stored):
    text = json.dumps(stored.meta["config"], indent=1)
    return f"The whole config, as sit_jax stores it:\n\n```json\n{text}\n```"


def _figures(paths):
    if not paths:
        return "None were measured for this export."
    rows = []
    for path in paths:
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"--figures {path}: no JSON to read") from error
        rows.append(f"`{path.name}`:\n\n```json\n{json.dumps(record, indent=1)}\n```")
    return "\n\n".join(rows)


def _arguments(model, stored):
    height, _, channels = stored.spec.shape
    given = {
        "input_size": height,
        "patch_size": model.patch,
        "in_channels": channels,
        "hidden_size": model.width,
        "depth": model.depth,
        "num_heads": model.heads,
        "mlp_ratio": model.mlp_ratio,
        "num_classes": model.classes,
        "learn_sigma": model.learn_sigma,
    }
    if hasattr(model, "decoder"):
        given["decode_layer"] = model.decoder
    return ", ".join(f"{name}={value}" for name, value in given.items())


def _reader(name):
    if name.endswith(".pt"):
        return f'torch.load("{name}", weights_only=True)'
    return f'safetensors.torch.load_file("{name}")'


def _flags(model, snippet):
    family = type(model).__name__.lower()
    telling = snippet == "diffusers" or family not in ("sit", "dit")
    return "" if telling else f" --family {family} --heads {model.heads}"


def _table(rows):
    lines = (f"| {name} | {value} |" for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *lines])
