"""States of AdamW and Adan: as torch saves them, as optax keeps them, both ways."""

import dataclasses
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from sit_jax.config import build
from sit_jax.convert.tensor_files import TensorFile, Tensors
from sit_jax.errors import UserError
from sit_jax.training.optimizers import AdanState, adan

MOMENTS = {  # torch's names, in its order -> the fields of our states
    optax.ScaleByAdamState: {"exp_avg": "mu", "exp_avg_sq": "nu"},
    AdanState: {
        "exp_avg": "mean",
        "exp_avg_sq": "square",
        "exp_avg_diff": "change",
        "neg_pre_grad": "negative",
    },
}
ADAM, ADAN = (tuple(fields) for fields in MOMENTS.values())
_COUNTING = (*MOMENTS, optax.ScaleByScheduleState)
# What torch.optim.AdamW of torch 2.13 saves besides, with the values of the originals.
_ADAMW_GROUP = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


@dataclasses.dataclass(frozen=True)
class AdamState:
    """What torch's AdamW or Adan saved.

    Attributes:
        step: number of updates.
        moments: for each of ADAM or ADAN, names of parameters to arrays. Parameters
            without a gradient have none.
        group: the hyperparameters: lr, betas, ...
    """

    step: int
    moments: Mapping[str, Mapping[str, np.ndarray]]
    group: Mapping[str, Any]


def read_adam(
    file: TensorFile, content: Any, names: Sequence[str], *keys: str
) -> AdamState | None:
    """Returns the state that a torch optimizer saved; None before its first step.

    Args:
        file: the opened file.
        content: the optimizer's part of it.
        names: of the model's parameters, in their order.
        *keys: which lead to content in the file.

    Raises:
        UserError: it is not the state of a plain AdamW or Adan with one group.
    """
    try:
        state, (group,) = content["state"], content["param_groups"]
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
            f"{file.path}: opt is not the state of an AdamW with one parameter group"
        ) from error
    if indices != list(range(len(names))) or not set(state) <= set(indices):
        raise UserError(
            f"{file.path}: opt has {len(indices)} parameters, model {len(names)}"
        )
    is_known = kinds in (set(ADAM), set(ADAN))
    if l2 or group.get("maximize") or group.get("no_prox") or not is_known:
        raise UserError(
            f"{file.path}: opt is no plain AdamW: {reprlib.repr(sorted(kinds))}, "
            f"{reprlib.repr(group)}"
        )
    if len(steps) > 1:
        raise UserError(f"{file.path}: opt is at several steps, {sorted(steps)}")
    moments = {
        kind: Tensors(file, {names[i]: (*keys, "state", i, kind) for i in state})
        for kind in ADAN
        if kind in kinds
    }
    return AdamState(int(steps.pop()), moments, group)


def torch_content(adam: AdamState, names: Sequence[str]) -> dict:
    """Returns what torch's optimizer would save; names: of the parameters, in order."""
    is_adan = len(adam.moments) > len(ADAM)
    state = {}
    for i, name in enumerate(names):
        if name in adam.moments["exp_avg"]:
            step = {} if is_adan else {"step": np.asarray(adam.step, np.float32)}
            moments = {kind: adam.moments[kind][name] for kind in adam.moments}
            state[i] = step | moments
    own = {"step": adam.step} if is_adan else _ADAMW_GROUP
    group = {**own, **adam.group, "params": list(range(len(names)))}
    return {"state": state, "param_groups": [group]}


def param_group(config: Any, step: int) -> dict[str, Any]:
    """Returns the hyperparameters that torch's AdamW or Adan would have at this step.

    Raises:
        UserError: the config's optimizer is neither.
    """
    ours = config.optimizer
    is_adamw = ours.make in (optax.adam, optax.adamw) and not ours.nesterov
    if not is_adamw and ours.make is not adan:
        raise UserError(f"config.optimizer is {ours.make.__name__}, not plain AdamW")
    rate = build(ours.learning_rate)
    group = {
        "lr": float(rate(step) if callable(rate) else rate),
        "betas": (ours.b1, ours.b2) if is_adamw else (ours.b1, ours.b2, ours.b3),
        "eps": ours.eps,
        "weight_decay": ours.get("weight_decay", 0.0),
    }
    if is_adamw:
        return group
    clip = {"max_grad_norm": config.clip or 0.0, "no_prox": False}
    return group | clip | {"foreach": True, "fused": True}


def moment_names(tx: optax.GradientTransformation, params: Any) -> tuple[str, ...]:
    """Returns torch's names of the moments that an optimizer keeps."""
    state = jax.eval_shape(tx.init, params)
    is_adam = lambda node: isinstance(node, tuple(MOMENTS))
    nodes = filter(is_adam, jax.tree.leaves(state, is_leaf=is_adam))
    return next((tuple(MOMENTS[type(node)]) for node in nodes), ())


def to_optax(
    tx: optax.GradientTransformation, params: Any, count: Any, moments: Sequence[Any]
) -> Any:
    """Returns the state of an optimizer with these moments.

    Args:
        tx: the optimizer, with whatever is chained around Adam or Adan.
        params: the parameters, or their shapes.
        count: number of updates, also of a schedule.
        moments: trees like params, in the order of moment_names().

    Raises:
        UserError: the optimizer keeps anything else, so it cannot go on from them.
    """
    filled = []

    def fill(node):
        if fields := MOMENTS.get(type(node)):
            filled.append(node)
            trees = dict(zip(fields.values(), moments, strict=True))
            return node._replace(count=count, **trees)
        if isinstance(node, optax.ScaleByScheduleState):
            return node._replace(count=count)
        raise UserError("config.optimizer keeps more than Adam's moments")

    state = jax.eval_shape(tx.init, params)
    state = jax.tree.map(fill, state, is_leaf=lambda node: isinstance(node, _COUNTING))
    if len(filled) != 1:
        raise UserError(f"config.optimizer has {len(filled)} parts with Adam's moments")
    return state
