"""Layouts of PyTorch weight files, and the state dict that a network has in torch.

A released file is one state dict. The originals' train.py saves {model, ema, opt,
args}; MDT's saves model010000.pt, ema_0.9999_010000.pt and opt010000.pt, where the
number is that of the step after which they were written, counted from 0.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sit_jax import checkpoint
from sit_jax.convert.optimizer import AdamState, read_adam
from sit_jax.convert.rules import (
    Rules,
    mdt_family,
    rules_for,
    to_flax,
    torch_constants,
    torch_shapes,
)
from sit_jax.convert.tensor_files import INDEX, StateDict, Tensors, open_file
from sit_jax.errors import UserError
from sit_jax.parallel import multihost
from sit_jax.training.state import init_params

# What DistributedDataParallel, torch.compile, FSDP, activation checkpointing and PEFT
# put into the names of tensors.
WRAPPERS = re.compile(
    r"(^|\.)((module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.)+"
)
PEFT_PREFIX = "base_model.model."
MODEL_KEYS = ("model", "state_dict", "module")
EMA_KEYS = ("ema", "model_ema", "state_dict_ema")
# An EMA of pos_embed, 7M times in float32, was up to 5e-4 off the table.
MAX_DRIFT = 1e-3


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """A torch file and what lies beside it.

    Attributes:
        path: the file.
        layout: its parts, for the report.
        model: names to arrays.
        ema: the same of the EMA; model itself where there is only one state dict.
        adam: the optimizer's state.
        args: what the train.py that wrote it ran with.
        ignored: keys that are not read.
        ema_rates: of ema and more_emas, where the files' names tell them.
        more_emas: EMAs at other rates, by name: ema_0.999.
        num_updates: that the weights have had, where the file's name tells it.
        family: sit, dit, ...; this and heads where a config lies beside the weights.
    """

    path: Path
    layout: str
    model: StateDict
    ema: StateDict
    adam: AdamState | None = None
    args: dict[str, Any] | None = None
    ignored: tuple[str, ...] = ()
    ema_rates: tuple[float, ...] = ()
    more_emas: Mapping[str, StateDict] = dataclasses.field(default_factory=dict)
    num_updates: int | None = None
    family: str | None = None
    heads: int | None = None

    def parts(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        """Returns model, ema, ..., and of an optimizer exp_avg, ..., step."""
        parts = {"model": self.model, "ema": self.ema, **self.more_emas}
        if self.adam is None:
            return parts
        step = {"step": np.asarray(self.adam.step, np.int32)}
        return {**parts, **self.adam.moments, "step": step}


def read_torch_file(path: str | Path) -> TorchFile:
    """Opens a file of weights, in whatever layout.

    A model010000.pt of MDT is read with the EMAs and the optimizer beside it.

    Raises:
        UserError: it is no such file, or would run code.
    """
    opened = open_file(path)
    file, number = _read_one(opened), mdt_number(opened.path)
    folder = opened.path.parent
    beside = folder.glob(f"*[_t]{number}.pt") if number else ()  # ema_R_N.pt, optN.pt
    multihost.assert_equal_files(*opened.paths, *beside)
    if number is None or mdt_family(file.model) is None:
        return file
    emas = _mdt_emas(folder, number)
    layout = ", ".join(["model", *(f"ema_{rate}" for rate in emas)])
    file = dataclasses.replace(file, num_updates=int(number) + 1, layout=layout)
    if emas:
        (_, ema), *others = emas.items()
        more = {f"ema_{rate}": state for rate, state in others}
        rates = tuple(emas)
        file = dataclasses.replace(file, ema=ema, ema_rates=rates, more_emas=more)
    opt = folder / f"opt{number}.pt"
    if opt.is_file():
        opened = open_file(opt)
        names = [name for name in file.model if not name.endswith(INDEX)]
        adam = read_adam(opened, opened.content(), names)
        file = dataclasses.replace(file, adam=adam, layout=f"{layout}, opt")
    return file


def mdt_number(path: Path) -> str | None:
    """Returns the digits in the name of a model010000.pt."""
    match = re.fullmatch(r"model(\d+)\.pt", Path(path).name)
    return match and match[1]


def _read_one(file):
    content = file.content()
    if file.is_state_dict(content):
        state = Tensors(file, _tensor_keys(file, content))
        return TorchFile(file.path, "bare state dict", state, state)
    if not isinstance(content, Mapping):
        raise UserError(f"{file.path} holds a {type(content).__name__}, no state dict")
    states = {
        key: _tensor_keys(file, content[key], key)
        for key in (*MODEL_KEYS, *EMA_KEYS)
        if file.is_state_dict(content.get(key))
    }
    model_key = next((key for key in MODEL_KEYS if key in states), None)
    ema_key = next((key for key in EMA_KEYS if key in states), None)
    if model_key and not ema_key and isinstance(content.get("ema"), Mapping):
        ema_key = "ema"
        states[ema_key] = _shadow_keys(file, content["ema"], states[model_key])
    model = Tensors(file, states[model_key]) if model_key else None
    ema = Tensors(file, states[ema_key]) if ema_key else None
    if not model and not ema:
        keys = ", ".join(str(key)[:50] for key in islice(content, 20)) or "nothing"
        raise UserError(f"{file.path} holds no weights, only {keys}")
    adam = None
    if model and "opt" in content:
        adam = read_adam(file, content["opt"], list(model), "opt")
    args = content.get("args")
    args = (
        _plain_args(file.path, args) if isinstance(args, argparse.Namespace) else None
    )
    used = [model_key, ema_key, "opt" if adam else None, "args" if args else None]
    used = list(filter(None, used))
    return TorchFile(
        path=file.path,
        layout="{" + ", ".join(used) + "}",
        model=model or ema,
        ema=ema or model,
        adam=adam,
        args=args,
        ignored=tuple(str(key) for key in content if key not in used),
    )


def _tensor_keys(file, state, *keys):
    """Returns names without those of wrappers, and the keys to each tensor."""
    keys_by_name = {}
    for key in state:
        name = WRAPPERS.sub(r"\1", str(key)).removeprefix(PEFT_PREFIX)
        if name in keys_by_name:
            raise UserError(f"{file.path} has two tensors for {name}")
        keys_by_name[name] = (*keys, key)
    return keys_by_name


def _shadow_keys(file, ema, model):
    """Returns the same of the EMA of torch_ema and diffusers, a list without names."""
    shadows = ema.get("shadow_params", ())
    parameters = [name for name in model if not name.endswith(INDEX)]
    trained = [name for name in parameters if name != "pos_embed"]
    names = parameters if len(shadows) == len(parameters) else trained
    if len(shadows) != len(names):
        raise UserError(
            f"{file.path}: ema has {len(shadows)} tensors, model {len(parameters)}"
        )
    return model | {name: ("ema", "shadow_params", i) for i, name in enumerate(names)}


def _plain_args(path, args):
    for name, value in vars(args).items():
        if not isinstance(value, (str, int, float, bool, type(None))):
            kind = type(value).__name__
            raise UserError(f"{path}: args.{name} is a {kind}, not a word or number")
    return dict(vars(args))


def _mdt_emas(folder, number):
    """Returns state dicts by rate, the slowest first, which is what is sampled."""
    emas = {}
    for path in folder.glob(f"ema_*_{number}.pt"):
        rate = path.name.removeprefix("ema_").removesuffix(f"_{number}.pt")
        if not re.fullmatch(r"\d*\.?\d+", rate):
            raise UserError(f"{path}: {rate!r} is not the rate of an average")
        emas[float(rate)] = _read_one(open_file(path)).ema
    return dict(sorted(emas.items(), reverse=True))


@dataclasses.dataclass(frozen=True)
class StateDictSpec:
    """The original's state dict of a network: names, shapes, constants and their order.

    Attributes:
        model: the network.
        shape: (height, width, channels) of its data.
    """

    model: Any
    shape: tuple[int, int, int]

    @cached_property
    def param_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of our parameters, by path."""
        init = partial(init_params, self.model, self.shape)
        return flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep="/")

    @property
    def rules(self) -> Rules:
        return rules_for(self.model)

    @cached_property
    def constants(self) -> dict[str, np.ndarray]:
        return torch_constants(self.model, self.shape[0])

    @cached_property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what has a gradient, by torch name in torch's order."""
        return torch_shapes(self.rules, self.param_shapes)

    @cached_property
    def names(self) -> list[str]:
        """All names in torch's order: a module's constants after its other tensors."""
        names = [name for name in self.constants if "." not in name]
        inner = {name.rpartition(".")[0]: name for name in self.constants}
        for name in self.trained:
            names.append(name)
            if (constant := inner.get(name.rpartition(".")[0])) is not None:
                names.append(constant)
        return names

    def leaves(self, state: Mapping) -> Iterator[tuple[str, np.ndarray]]:
        """Yields (path, array) of a state dict's parameters, the largest first."""
        for rule in sorted(
            self.rules, key=lambda rule: -self.param_shapes[rule[1]].size
        ):
            params, _ = to_flax([rule], state)
            yield rule[1], flatten_dict(params, sep="/")[rule[1]]

    def to_params(self, state: Mapping, put: Callable = lambda leaf: leaf) -> dict:
        """Returns the parameters of a state dict, each leaf passed through put."""
        leaves = {path: put(leaf) for path, leaf in self.leaves(state)}
        return unflatten_dict(leaves, sep="/")

    def check(self, path: str | Path, state: StateDict) -> None:
        """Refuses a state dict with other names, shapes or constants."""
        tables = {name: table.shape for name, table in self.constants.items()}
        as_leaves = lambda shapes: {
            name: jax.ShapeDtypeStruct(shape, np.float32)
            for name, shape in shapes.items()
        }
        checkpoint.require_same_shapes(
            str(path), as_leaves(state.shapes), as_leaves(tables | self.trained)
        )
        for name, table in self.constants.items():
            drift = float(np.abs(state[name] - table).max())
            if not drift <= MAX_DRIFT:
                kind = "position" if table.dtype.kind == "i" else "sine-cosine"
                raise UserError(
                    f"{path}: {name} is not the {kind} table of this size but up "
                    f"to {drift:.2g} off"
                )
