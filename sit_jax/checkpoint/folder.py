"""A checkpoint directory as a file system sees it: steps, items, what was cut off."""

import re

from sit_jax import places
from sit_jax.errors import UserError
from sit_jax.places import MARK, absolute, in_bucket, place


def steps(directory):
    """Complete steps in a checkpoint directory, ascending; [] where there is none."""
    return sorted(int(child.name) for child in _numbered(directory) if _whole(child))


def find(path):
    """A workdir, checkpoint directory or one of its steps -> (directory, step).

    Of several steps, the newest.
    """
    path = absolute(path)
    if path.is_file():
        raise UserError(
            f"{path} is a file and no checkpoint; port_weights.py makes one of .pt"
        )
    if path.name.isdecimal() and int(path.name) in steps(path.parent):
        return path.parent, int(path.name)
    for directory in (path / "checkpoints", path):
        if found := steps(directory):
            return directory, found[-1]
    raise UserError(f"no checkpoint in {path}; it holds no step directory")


def items(directory, step):
    """Names of the items that a step holds."""
    children = (place(directory) / str(step)).iterdir()
    return {child.name for child in children if child.is_dir()}


def unfinished(directory):
    """Steps of which only a part was written when a run was killed, ascending."""
    directory = place(directory)
    if in_bucket(directory):
        found = (child for child in _numbered(directory) if not _whole(child))
        return sorted(int(child.name) for child in found)
    if not directory.is_dir():
        return []
    names = (child.name for child in directory.iterdir())
    found = (re.match(r"(\d+)\.orbax-checkpoint-tmp", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def set_aside(directory, step):
    """Renames a step so that it is none any more; -> its new name."""
    step = place(directory) / str(step)
    aside = step.with_name(f"{step.name}.damaged")
    number = 1
    while aside.exists():
        number += 1
        aside = step.with_name(f"{step.name}.damaged{number}")
    places.move(step, aside)
    return aside


def _numbered(directory):
    """Folders that a step may be, complete or not."""
    directory = place(directory)
    if not directory.is_dir():
        return
    for child in directory.iterdir():
        if child.name.isdecimal() and child.is_dir():
            yield child


def _whole(step):
    """On a disk a step gets its name when it is complete, in a bucket a mark."""
    return not in_bucket(step) or (step / MARK).exists()
