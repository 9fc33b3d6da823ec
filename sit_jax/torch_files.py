"""The layouts of PyTorch weight files: bare, or with what train.py saves beside them.

Released files are one state dict. The originals' train.py saves {model, ema, opt,
args}; others keep a state dict under one of those names or under state_dict.
"""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sit_jax.errors import UserError
from sit_jax.tensor_files import Tensors, open_file

WRAPPERS = ("module", "_orig_mod")  # what DistributedDataParallel, torch.compile add


@dataclasses.dataclass(frozen=True)
class Adam:
    """Moments by parameter name; parameters without a gradient have none."""

    step: int
    exp_avg: Mapping
    exp_avg_sq: Mapping
    group: dict  # lr, betas, ...


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """One state dict is both model and ema where the file holds only one."""

    path: Path
    layout: str  # in words
    model: Tensors
    ema: Tensors
    adam: Adam | None = None
    args: dict | None = None  # what the train.py that wrote it ran with
    ignored: tuple[str, ...] = ()

    def parts(self):
        """-> {part: names to arrays}: model, ema; exp_avg, exp_avg_sq, step if any."""
        parts = {"model": self.model, "ema": self.ema}
        if self.adam is None:
            return parts
        moments = {"exp_avg": self.adam.exp_avg, "exp_avg_sq": self.adam.exp_avg_sq}
        step = {"step": np.asarray(self.adam.step, np.int32)}
        return parts | moments | {"step": step}


def read(path):
    """-> TorchFile. What is no such file, or would run code, is refused in one line."""
    opened = open_file(path)
    path, content = opened.path, opened.content()
    if opened.is_state(content):
        bare = _tensors(opened, content)
        return TorchFile(path, "bare state dict", bare, bare)
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a state dict")
    found = {
        key: _tensors(opened, content[key], key)
        for key in ("model", "state_dict", "ema")
        if opened.is_state(content.get(key))
    }
    if not found:
        held = ", ".join(map(str, content)) or "nothing"
        raise UserError(f"{path} holds no weights, only {held}")
    model = found.get("model", found.get("state_dict"))
    ema = found.get("ema", model)
    adam = _adam(opened, content["opt"], model) if model and "opt" in content else None
    args = content.get("args")
    args = _plain(path, args) if isinstance(args, argparse.Namespace) else None
    used = [*found, *(["opt"] if adam else []), *(["args"] if args else [])]
    ignored = tuple(str(key) for key in content if key not in used)
    layout = "{" + ", ".join(used) + "}"
    return TorchFile(path, layout, model or ema, ema, adam, args, ignored)


def train_layout(model, ema, adam, args):
    """-> what the originals' train.py saves; model and ema map names to arrays."""
    names = list(model)
    moments = {
        index: {
            "step": np.asarray(adam.step, np.float32),
            "exp_avg": adam.exp_avg[name],
            "exp_avg_sq": adam.exp_avg_sq[name],
        }
        for index, name in enumerate(names)
        if name in adam.exp_avg
    }
    group = {**_GROUP, **adam.group, "params": list(range(len(names)))}
    opt = {"state": moments, "param_groups": [group]}
    return {"model": model, "ema": ema, "opt": opt, "args": argparse.Namespace(**args)}


# What torch.optim.AdamW of torch 2.13 saves, with the values of the originals.
_GROUP = {
    "lr": 1e-4,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0,
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


def _tensors(opened, state, *place):
    """state's tensors under their own names, without those of wrappers around them."""
    places = {}
    for key in state:
        name = ".".join(part for part in str(key).split(".") if part not in WRAPPERS)
        if name in places:
            raise UserError(f"{opened.path} has two tensors for {name}")
        places[name] = (*place, key)
    return Tensors(opened, places)


def _adam(opened, opt, model):
    """What torch.optim.AdamW over the parameters of model saved; None before step 1."""
    try:
        state, (group,), names = opt["state"], opt["param_groups"], list(model)
        group = dict(group)
        indices = group.pop("params")
        l2 = group["weight_decay"] and not group.get("decoupled_weight_decay", True)
        if not state:
            return None
        steps = {float(moments["step"]) for moments in state.values()}
        kinds = {kind for moments in state.values() for kind in moments}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{opened.path}: opt is not the state of an AdamW with one parameter group"
        ) from error
    if indices != list(range(len(names))) or not set(state) <= set(indices):
        raise UserError(
            f"{opened.path}: opt has {len(indices)} parameters, model {len(names)}"
        )
    if l2 or group.get("maximize") or kinds != {"step", "exp_avg", "exp_avg_sq"}:
        raise UserError(
            f"{opened.path}: opt is no plain AdamW: {sorted(kinds)}, {group}"
        )
    if len(steps) > 1:
        raise UserError(f"{opened.path}: opt is at several steps, {sorted(steps)}")
    moments = (
        Tensors(opened, {names[i]: ("opt", "state", i, kind) for i in sorted(state)})
        for kind in ("exp_avg", "exp_avg_sq")
    )
    return Adam(int(steps.pop()), *moments, group)


def _plain(path, args):
    for name, value in vars(args).items():
        if not isinstance(value, (str, int, float, bool, type(None))):
            raise UserError(f"{path}: args.{name} is {value!r}, not a word or number")
    return dict(vars(args))
