"""Writes the two pages of docs/reference that follow from the code: flags and fields.

python docs/generate.py    (make docs runs it; git ignores what it writes)
"""

import argparse
import importlib
import inspect
import re
import sys
import typing
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from sit_jax import config as configs  # noqa: E402
from sit_jax.experiment import FIELDS  # noqa: E402

COMMANDS = (
    "train sample evaluate port_weights extract_features quantize diagnose".split()
)
CONSTRUCTORS = {  # field of a config -> modules below sit_jax, and what may stand there
    "model": {"models.dit": "SiT DiT", "models.mdt": "MDT MDTv2"},
    "process": {
        "diffusion.interpolant": "Interpolant",
        "diffusion.gaussian": "GaussianDiffusion",
        "diffusion.loss_weights": "MinSnr MinSnrHybridLoss",
    },
    "timesteps": {
        "diffusion.timesteps": "DensityTimesteps LogitNormal Mode LossSecondMoment"
    },
    "guidance": {"diffusion.guidance": "PowerCosine GuidanceInterval"},
    "sampler": {
        "samplers.fixed_ode": "FixedStepODE Adams",
        "samplers.adaptive_ode": "AdaptiveODE",
        "samplers.sde": "SDE",
        "samplers.ddpm": "DDPM DDIM",
    },
    "codec": {"models.codec": "Pixels Latents"},
    "adapter": {"adapters.lora": "LoRA"},
    "optimizer": {"training.optimizers": "adan"},
    "source": {
        "data.sources": "Digits LatentFolder Synthetic LabelOffset ImageTransform",
        "data.latent_cache": "LatentCache",
        "data.folders": "ImageFolder AdmFolder CifarFolder",
        "data.archives": "ImageNetTar WebdatasetTars Tfds",
    },
}
FLAGS_PAGE = """# All flags

What `--help` of each command prints. `--config.FIELD=VALUE` sets any field of a config:
[all fields](fields.md). What each command is for: [commands](commands.md).
"""
FIELDS_PAGE = """# All config fields

```
python train.py --config configs/sit_xl2.py --print-config
python train.py --config configs/sit_xl2.py --config.model.depth=4 --print-config
```

A config is a Python file with a `get_config()`, which begins with a published run of
`sit_jax/recipes.py`. *Value* below is that of `configs/sit_xl2.py`. A run that goes on
may change the fields marked *yes*.

## Fields of every config
"""


class _Parsed(BaseException):
    """Ends a command where it would read its arguments."""


def parser_of(command):
    """Returns the parser that a command makes, without running the command."""
    parsers = []

    def capture(parser, *args, **kwargs):
        parsers.append(parser)
        raise _Parsed

    module = importlib.import_module(f"sit_jax.cli.{command}")
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", capture),
        mock.patch.object(sys, "argv", [f"{command}.py"]),
    ):
        try:
            module.main()
        except _Parsed:
            return parsers[0]
    raise RuntimeError(f"sit_jax/cli/{command}.py parses no arguments")


def flags_page():
    """Returns the page of all flags; groups of several commands stand at its end."""
    groups = {command: groups_of(parser_of(command)) for command in COMMANDS}
    every = [group for found in groups.values() for group in found.items()]
    lines, shared = [FLAGS_PAGE], {}
    for command, found in groups.items():
        lines += [f"## {command}.py", parser_of(command).description, ""]
        for title, rows in found.items():
            if every.count((title, rows)) > 1:
                shared.setdefault((title, tuple(rows)), []).append(f"`{command}.py`")
                continue
            lines += [f"**{title.capitalize()}**", "", "| flag | what it does |"]
            lines += ["|---|---|", *rows, ""]
    for (title, rows), commands in shared.items():
        lines += [f"## {title.capitalize()}", f"Of {', '.join(commands)}.", ""]
        lines += ["| flag | what it does |", "|---|---|", *rows, ""]
    return "\n".join(lines)


def groups_of(parser):
    """Returns {title: rows of a table} of a parser's groups that have any."""
    names = {"positional arguments": "arguments", "options": "general"}
    groups = {}
    for group in parser._action_groups:
        rows = [flag_row(action) for action in group._group_actions]
        if rows := [row for row in rows if "--help" not in row]:
            groups[names.get(group.title, group.title)] = rows
    return groups


def flag_row(action):
    """Returns a row of a table for one argument."""
    value = action.metavar or ("|".join(action.choices) if action.choices else "")
    if isinstance(value, tuple):
        value = " ".join(value)
    if not value and action.nargs != 0:
        value = action.dest.upper()
    names = action.option_strings or [value]
    flag = ", ".join(f"`{name}`" for name in names)
    if action.option_strings and value:
        flag += f" `{value}`"
    words = escape(action.help or "")
    if isinstance(action.default, (int, float, str)) and action.default is not False:
        if action.default != argparse.SUPPRESS:
            words += f" (default `{action.default}`)"
    return f"| {flag} | {words.strip()} |"


def fields_page():
    """Returns the page of all fields of configs and of what may stand in them."""
    published = configs.to_json(configs.load(ROOT / "configs/sit_xl2.py"))
    lines = [FIELDS_PAGE, "| field | value | what it means | range | may change |"]
    lines.append("|---|---|---|---|---|")
    for name, field in FIELDS.items():
        value = published
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        bounds = "" if field.range is None else escape(str(field.range))
        may = "yes" if field.may_change else ""
        is_group = isinstance(value, dict) and "make" not in value
        shown = "" if value is None or is_group else f"`{short(value)}`"
        lines.append(f"| `{name}` | {shown} | {field.meaning} | {bounds} | {may} |")
    for role, modules in CONSTRUCTORS.items():
        lines += ["", f"## What `{role}` may be"]
        for module, names in modules.items():
            for name in names.split():
                lines += constructor(importlib.import_module(f"sit_jax.{module}"), name)
    return "\n".join(lines) + "\n"


def constructor(module, name):
    """Returns the lines about one constructor and its fields."""
    make = getattr(module, name)
    file = module.__name__.replace(".", "/")
    lines = ["", f"### {name}", f"{inspect.getdoc(make).splitlines()[0]} `{file}.py`"]
    known = configs.spec(make).keys()
    fields = [each for each in _parameters(make) if each.name in known]
    if fields:
        lines += ["", "| field | default | type |", "|---|---|---|"]
    for field in fields:
        default, hint = field.default, field.annotation
        default = "needed" if default is field.empty else f"`{short(default)}`"
        hint = "" if hint is field.empty else f"`{type_name(hint)}`"
        lines.append(f"| `{field.name}` | {default} | {hint} |")
    return lines


def _parameters(make):
    return inspect.signature(make).parameters.values()


def type_name(hint):
    """Returns an annotation as a person writes it, with a range in words."""
    if typing.get_origin(hint) is typing.Annotated:
        hint, bounds = typing.get_args(hint)
        return f"{hint.__name__}: {bounds}"
    text = hint if isinstance(hint, str) else inspect.formatannotation(hint)
    if text.startswith("Union["):
        text = "float | Callable"
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)


def short(value):
    """Returns a value as a person writes it: a function or class by its name."""
    if isinstance(value, dict):
        value = value.get("make", value)
        value = value.get("name", value) if isinstance(value, dict) else value
    if hasattr(value, "to_dict"):
        value = value.get("make", value)
    if callable(value) and hasattr(value, "__name__"):
        return value.__name__
    text = str(value)
    return text.rpartition(".")[2] if text.startswith(("sit_jax.", "optax.")) else text


def escape(text):
    """Returns text for a cell of a table; code needs no escape in Markdown's tables."""
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    folder = ROOT / "docs/reference"
    (folder / "flags.md").write_text(flags_page())
    (folder / "fields.md").write_text(fields_page())
