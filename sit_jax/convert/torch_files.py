"""The layouts of PyTorch weight files: bare, or with what train.py saves beside them.

Released files are one state dict. The originals' train.py saves {model, ema, opt,
args}; others keep a state dict under one of those names or under state_dict.
"""

import argparse
import dataclasses
import reprlib
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from sit_jax.convert.tensor_files import Tensors, open_file
from sit_jax.errors import UserError

ADAM = ("exp_avg", "exp_avg_sq")
ADAN = (*ADAM, "exp_avg_diff", "neg_pre_grad")
WRAPPERS = ("module", "_orig_mod")  # what DistributedDataParallel, torch.compile add


@dataclasses.dataclass(frozen=True)
class Adam:
    """Moments by parameter name; parameters without a gradient have none."""

    step: int
    exp_avg: Mapping
    exp_avg_sq: Mapping
    group: dict  # lr, betas, ...
    more: Mapping = dataclasses.field(
        default_factory=dict
    )  # what Adan keeps besides, by name

    @property
    def moments(self):
        return {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, **self.more}


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
    rates: tuple[float, ...] = ()  # of ema and averages, where their names tell
    averages: Mapping = dataclasses.field(
        default_factory=dict
    )  # further ones, as ema_0.999
    updates: int | None = None  # that the weights have had, where their name tells
    family: str | None = None  # these two where a config beside the weights tells them
    heads: int | None = None

    def parts(self):
        """-> {part: names to arrays}: model, ema ...; exp_avg, ..., step if any."""
        parts = {"model": self.model, "ema": self.ema, **self.averages}
        if self.adam is None:
            return parts
        step = {"step": np.asarray(self.adam.step, np.int32)}
        return parts | self.adam.moments | {"step": step}


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
        held = ", ".join(str(key)[:50] for key in islice(content, 20)) or "nothing"
        raise UserError(f"{path} holds no weights, only {held}")
    model = found.get("model", found.get("state_dict"))
    ema = found.get("ema", model)
    has_opt = model and "opt" in content
    adam = adam_of(opened, content["opt"], list(model), "opt") if has_opt else None
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
    group = {**GROUP, **adam.group, "params": list(range(len(names)))}
    opt = {"state": moments, "param_groups": [group]}
    return {"model": model, "ema": ema, "opt": opt, "args": argparse.Namespace(**args)}


# What torch.optim.AdamW of torch 2.13 saves, with the values of the originals.
GROUP = {
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


def adam_of(opened, opt, names, *place):
    """-> Adam of what torch.optim.AdamW or Adan saved; None before step 1.

    names: the parameters in their order; place: keys that lead to opt in the file.
    """
    try:
        state, (group,) = opt["state"], opt["param_groups"]
        group = dict(group)
        indices = group.pop("params")
        l2 = group["weight_decay"] and not group.get("decoupled_weight_decay", True)
        if not state:
            return None
        kinds = {kind for moments in state.values() for kind in moments} - {"step"}
        own = [moments["step"] for moments in state.values() if kinds == set(ADAM)]
        steps = {float(step) for step in own or [group.pop("step")]}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{opened.path}: opt is not the state of an AdamW with one parameter group"
        ) from error
    if indices != list(range(len(names))) or not set(state) <= set(indices):
        raise UserError(
            f"{opened.path}: opt has {len(indices)} parameters, model {len(names)}"
        )
    known = kinds in (set(ADAM), set(ADAN))
    if l2 or group.get("maximize") or group.get("no_prox") or not known:
        raise UserError(
            f"{opened.path}: opt is no plain AdamW: {reprlib.repr(sorted(kinds))}, "
            f"{reprlib.repr(group)}"
        )
    if len(steps) > 1:
        raise UserError(f"{opened.path}: opt is at several steps, {sorted(steps)}")
    moments = {
        kind: Tensors(opened, {names[i]: (*place, "state", i, kind) for i in state})
        for kind in ADAN
        if kind in kinds
    }
    adam = (moments.pop(kind) for kind in ADAM)
    return Adam(int(steps.pop()), *adam, group, moments)


def _plain(path, args):
    for name, value in vars(args).items():
        if not isinstance(value, (str, int, float, bool, type(None))):
            kind = type(value).__name__
            raise UserError(f"{path}: args.{name} is a {kind}, not a word or number")
    return dict(vars(args))
