"""The files of one step of MDT's train script: model, averages, optimizer.

model010000.pt, ema_0.9999_010000.pt and opt010000.pt: state dicts, as released, and
what the optimizer saved. The number is of the step after which they were written,
counted from 0, so there have been as many updates and one.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np

from sit_jax.convert import torch_files
from sit_jax.convert.infer_config import mdt_family
from sit_jax.convert.tensor_files import INDEX, open_file
from sit_jax.errors import UserError
from sit_jax.parallel import multihost


def read(path):
    """-> TorchFile; one called model010000.pt with what lies beside it.

    Also of all other kinds, as torch_files.read.
    """
    file = torch_files.read(path)
    multihost.assert_equal_files(file.path, *_beside(file.path))
    number = number_of(file.path)
    if number is None or mdt_family(file.model) is None:
        return file
    averages = _averages(file.path.parent, number)
    used = ["model", *(f"ema_{rate}" for rate in averages)]
    file = dataclasses.replace(file, updates=int(number) + 1, layout=", ".join(used))
    if averages:
        (first, ema), *others = averages.items()
        others = {f"ema_{rate}": each for rate, each in others}
        file = dataclasses.replace(
            file, ema=ema, rates=tuple(averages), averages=others
        )
    opt = file.path.with_name(f"opt{number}.pt")
    if not opt.is_file():
        return file
    opened = open_file(opt)
    names = [name for name in file.model if not name.endswith(INDEX)]
    adam = torch_files.adam_of(opened, opened.content(), names)
    return dataclasses.replace(file, adam=adam, layout=f"{file.layout}, opt")


def number_of(path):
    """The digits in the name of a model010000.pt, or None."""
    found = re.fullmatch(r"model(\d+)\.pt", Path(path).name)
    return found and found[1]


def named(step):
    """The name of the model's file after so many updates."""
    return f"model{step - 1:06d}.pt"


def layout(step, rates, parts, group):
    """-> {file name: its content}; parts: {part: state dict}, the optimizer's if any.

    rates: of the parts ema, ema_0.999, ...; group: what else the optimizer saves.
    """
    number = f"{step - 1:06d}"
    files = {f"model{number}.pt": parts["model"]}
    for rate in rates:
        part = "ema" if rate == rates[0] else f"ema_{rate}"
        files[f"ema_{rate}_{number}.pt"] = parts[part]
    if "step" not in parts:
        return files
    count = int(parts["step"]["step"])
    kinds = [kind for kind in torch_files.ADAN if kind in parts]
    adan = len(kinds) > len(torch_files.ADAM)
    state = {}
    for i, name in enumerate(parts["exp_avg"]):
        state[i] = {} if adan else {"step": np.asarray(count, np.float32)}
        state[i] |= {kind: parts[kind][name] for kind in kinds}
    whole = {**group, "step": count} if adan else {**torch_files.GROUP, **group}
    whole["params"] = list(range(len(state)))
    return files | {f"opt{number}.pt": {"state": state, "param_groups": [whole]}}


def _beside(path):
    """What is read with a model's file, if there is any of it."""
    number = number_of(path)
    names = (f"ema_*_{number}.pt", f"opt{number}.pt")
    return [file for name in names for file in path.parent.glob(name) if number]


def _averages(folder, number):
    """-> {rate: state dict} from the slowest on, which is what is sampled."""
    found = {}
    for path in folder.glob(f"ema_*_{number}.pt"):
        rate = path.name.removeprefix("ema_").removesuffix(f"_{number}.pt")
        if not re.fullmatch(r"\d*\.?\d+", rate):
            raise UserError(f"{path}: {rate!r} is not the rate of an average")
        found[float(rate)] = torch_files.read(path).ema
    return dict(sorted(found.items(), reverse=True))
