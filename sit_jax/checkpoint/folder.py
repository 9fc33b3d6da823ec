"""A checkpoint directory as a file system sees it: steps, items, what was cut off."""

import re
from pathlib import Path

from sit_jax.errors import UserError
from sit_jax.places import local


def steps(directory):
    """Complete steps in a checkpoint directory, ascending; [] where there is none."""
    directory = local(directory)
    if not directory.is_dir():
        return []
    names = (child.name for child in directory.iterdir() if child.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def find(path):
    """A workdir, checkpoint directory or one of its steps -> (directory, step).

    Of several steps, the newest.
    """
    path = local(path)
    if path.is_file():
        raise UserError(
            f"{path} is a file and no checkpoint; port_weights.py makes one of .pt"
        )
    if path.name.isdecimal() and int(path.name) in steps(path.parent):
        return path.parent.absolute(), int(path.name)
    for directory in (path / "checkpoints", path):
        if found := steps(directory):
            return directory.absolute(), found[-1]
    raise UserError(f"no checkpoint in {path}; it holds no step directory")


def items(directory, step):
    """Names of the items that a step holds."""
    children = (Path(directory) / str(step)).iterdir()
    return {child.name for child in children if child.is_dir()}


def unfinished(directory):
    """Steps of which only a part was written when a run was killed, ascending."""
    directory = local(directory)
    if not directory.is_dir():
        return []
    names = (child.name for child in directory.iterdir())
    found = (re.match(r"(\d+)\.orbax-checkpoint-tmp", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def set_aside(directory, step):
    """Renames a step so that it is none any more; -> its new name."""
    step = Path(directory) / str(step)
    aside = step.with_name(f"{step.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = step.with_name(f"{step.name}.damaged{number}")
    step.rename(aside)
    return aside
