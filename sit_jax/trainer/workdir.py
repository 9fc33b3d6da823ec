"""Keeps a run's folder: its config, and the refusal to mix two runs in one."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from sit_jax.checkpoint import steps
from sit_jax.errors import UserError
from sit_jax.experiment import fixed_differences
from sit_jax.files import AnyPath, PathLike, as_path, read_json, write_json
from sit_jax.parallel import multihost


@contextlib.contextmanager
def locked_workdir(path: PathLike, config: Mapping[str, Any]) -> Iterator[AnyPath]:
    """Gives a run's folder, which no other run is in meanwhile.

    It is locked before the first look into it: another run may be replacing what is
    there. Then a folder that is not free for this JSON config is refused.
    """
    with multihost.lock(path):
        path = check_workdir(path, config)
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        remedy = "their config files differ: bring them to the same version"
        multihost.assert_equal("the config's sha256", digest[:12], remedy)
        remedy = "the workdir must be on a file system that all hosts share"
        newest = steps(path / "checkpoints")[-1:]
        multihost.assert_equal(f"newest step in {path}", newest, remedy)
        yield path


def check_workdir(path: PathLike, config: Mapping[str, Any]) -> AnyPath:
    """Returns the folder; refuses one that is not free for this JSON config."""
    path = as_path(path)
    if path.is_file():
        raise UserError(f"{path} is a file; take another --workdir")
    if steps(path):
        raise UserError(
            f"{path} is a checkpoint directory, not a workdir; begin from it with "
            f"--init {path} and a --workdir of its own"
        )
    if (path / "config.json").exists():
        before = read_json(path / "config.json")
        fixed = [
            f"{name} was {old}, is {new}"
            for name, old, new in fixed_differences(before, config)
        ]
        if fixed:
            raise UserError(
                f"{path} belongs to another config ({'; '.join(fixed)}); "
                "take a new --workdir"
            )
    return path


def open_workdir(path: PathLike, config: Mapping[str, Any]) -> AnyPath:
    """Makes the folder and writes a JSON config into it, which check_workdir() took.

    Process 0 makes it; the others have to see it.
    """
    path = as_path(path)
    try:
        if multihost.is_primary():
            path.mkdir(parents=True, exist_ok=True)
            write_json(path / "config.json", config)
    except OSError as error:
        reason = f"{error.filename or path}: {error.strerror or error}"
        raise UserError(f"{reason}; take another --workdir") from error
    multihost.assert_shared(path / "config.json")
    return path
