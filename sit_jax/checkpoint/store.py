"""Saves and loads steps with Orbax; see the package's docstring for what they hold.

A step gets its name when it is complete, so what a kill interrupts is never taken for a
checkpoint. Loading compares checksums and shapes first, and places each array as the
target says: a checkpoint of eight devices loads on one, and the other way round.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import type_handlers

from sit_jax.checkpoint.checksums import damages, has_checksums, write_checksums
from sit_jax.errors import UserError
from sit_jax.files import absolute_path as as_path
from sit_jax.files import remove
from sit_jax.parallel import multihost

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates; it also raises

Path = str | epath.Path
T = TypeVar("T")


class DamagedCheckpoint(UserError):
    """A step whose files are not what was saved.

    Args:
      directory: the checkpoint directory.
      step: number of the damaged step.
      reason: what is wrong with it.
    """

    def __init__(self, directory: Path, step: int, reason: str):
        self.step, self.reason = step, reason
        super().__init__(
            f"{directory}/{step} is damaged: {reason}; take an older step; "
            f"python -m sit_jax.checkpoint verify {directory} tells which are whole"
        )


def steps(directory: Path) -> list[int]:
    """Returns the complete steps in a checkpoint directory, ascending."""
    return sorted(set(ocp.utils.checkpoint_steps(as_path(directory))))


def find_step(path: Path) -> tuple[epath.Path, int]:
    """Finds the newest step of a workdir or checkpoint directory, or the step itself.

    Returns:
      The checkpoint directory and the step's number.

    Raises:
      UserError: there is no step.
    """
    path = as_path(path)
    if path.is_file():
        raise UserError(
            f"{path} is a file and no checkpoint; port_weights.py makes one of .pt"
        )
    if path.name.isdecimal() and int(path.name) in steps(path.parent):
        return path.parent, int(path.name)
    for directory in (path / "checkpoints", path):
        if numbers := steps(directory):
            return directory, numbers[-1]
    raise UserError(f"no checkpoint in {path}; it holds no step directory")


def items(directory: Path, step: int) -> set[str]:
    """Returns the names of the items that a step holds."""
    children = (as_path(directory) / str(step)).iterdir()
    return {child.name for child in children if child.is_dir()}


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """Maps names like "blocks/attn/qkv/kernel" to the leaves of a tree."""
    keystr = jax.tree_util.keystr
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def require_same_shapes(source: str, saved: Any, wanted: Any) -> None:
    """Refuses a tree whose names or shapes are not the wanted ones, and lists them.

    Args:
      source: what the trees are of, for the message.
      saved: a tree of anything with a shape.
      wanted: the tree that it should be like.
    """
    shapes = lambda tree: {k: np.shape(v) for k, v in leaves_by_name(tree).items()}
    saved, wanted = shapes(saved), shapes(wanted)
    lines = [f"missing {name}" for name in wanted if name not in saved]
    lines += [f"extra {name}" for name in saved if name not in wanted]
    lines += [
        f"{name} is {tuple(saved[name])}, not {tuple(shape)}"
        for name, shape in wanted.items()
        if saved.get(name, shape) != shape
    ]
    if lines:
        more = f"; and {len(lines) - 8} more" if len(lines) > 8 else ""
        listed = "; ".join(lines[:8])
        raise UserError(f"{source} is of another architecture: {listed}{more}")


def read_meta(directory: Path, step: int) -> dict[str, Any]:
    """Reads what describes a step: its config, number and provenance."""
    path = _require_item(directory, step, "meta")
    with (
        _file_errors(directory, step),
        ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer,
    ):
        return checkpointer.restore(path)


def load(directory: Path, step: int, **targets: Any) -> dict[str, Any]:
    """Loads items of a step.

    Args:
      directory: the checkpoint directory.
      step: number of the step.
      **targets: for each wanted item a tree of jax.ShapeDtypeStruct with shardings;
        nothing else is read.

    Returns:
      The items, shaped and sharded like their targets.

    Raises:
      UserError: an item is missing, or of another architecture.
      DamagedCheckpoint: a file is not what was saved.
    """
    loaded = {}
    paths = {name: _require_item(directory, step, name) for name in targets}
    for name, target in targets.items():
        path = paths[name]
        with _file_errors(directory, step), ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.metadata(path).item_metadata.tree
            require_same_shapes(f"{directory}/{step}, {name}", saved, target)
            loaded[name] = checkpointer.restore(path, target)
    return loaded


def iter_leaves(
    directory: Path, step: int, item: str, target: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the leaves of one item, the largest first, with little in memory.

    Args:
      directory: the checkpoint directory.
      step: number of the step.
      item: name of the item.
      target: a tree of shapes.

    Yields:
      Names as of leaves_by_name, and arrays.
    """
    path = _require_item(directory, step, item)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    leaves, structure = jax.tree.flatten(target)
    names = list(leaves_by_name(target))
    with _file_errors(directory, step), ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path).item_metadata.tree
        require_same_shapes(f"{directory}/{step}, {item}", saved, target)
        for i in sorted(range(len(leaves)), key=lambda i: -leaves[i].size):
            only = [ocp.PLACEHOLDER] * len(leaves)
            args = [ocp.RestoreArgs()] * len(leaves)
            only[i] = leaves[i]
            args[i] = ocp.ArrayRestoreArgs(sharding=device, dtype=leaves[i].dtype)
            restore = ocp.args.PyTreeRestore(
                structure.unflatten(only), restore_args=structure.unflatten(args)
            )
            array = leaves_by_name(checkpointer.restore(path, args=restore))[names[i]]
            yield names[i], np.asarray(array)


def require_intact(directory: Path, step: int, items: set[str] | None = None) -> None:
    """Refuses a step that is not there, or whose items differ from their checksums.

    Args:
      directory: the checkpoint directory.
      step: number of the step.
      items: names of the items that will be used; None means all.
    """
    if step not in steps(directory):
        raise UserError(f"no checkpoint of step {step} in {directory}")
    if problems := damages(as_path(directory) / str(step), items):
        more = f", and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise DamagedCheckpoint(directory, step, problems[0] + more)


def restore_newest(directory: Path, restore: Callable[[int], T]) -> tuple[T, list[str]]:
    """Restores the newest step that is whole, and sets damaged newer ones aside.

    A step without checksums counts as half copied where an older step has them. If no
    step is whole, the newest one is refused and all stay as they are. Several processes
    agree on the step.

    Args:
      directory: a checkpoint directory with at least one step.
      restore: called with a step's number; it may raise DamagedCheckpoint.

    Returns:
      What restore returned, and lines that say what was done.
    """
    directory, damaged = as_path(directory), []
    numbers = steps(directory)
    for i, step in reversed(list(enumerate(numbers))):
        try:
            _require_intact_everywhere(directory, step, older=numbers[:i])
            restored = restore(step)
            break
        except DamagedCheckpoint as error:
            damaged.append(error)
    else:
        raise damaged[0]
    lines = [f"goes on from step {step}"]
    if not has_checksums(directory / str(step)):
        lines.append("it has no checksums, so damage cannot be noticed")
    for error in damaged:
        aside = _set_aside(directory, error.step).name
        lines.append(
            f"WARNING: step {error.step} is damaged ({error.reason}); it is kept as "
            f"{aside}, which may be removed"
        )
    for path in sorted(directory.glob("*.orbax-checkpoint-tmp*")):
        lines.append(f"the unfinished save {path.name} is removed")
    return restored, lines


class Checkpoints:
    """Saves steps into one directory, in the background.

    Args:
      directory: the checkpoint directory; it is made if it is missing.
      keep_last: how many of the newest steps are kept; None keeps all.
      keep_every: steps divisible by it are kept for good.
    """

    def __init__(
        self,
        directory: Path,
        keep_last: int | None = None,
        keep_every: int | None = None,
    ):
        self.directory = as_path(directory)
        # Where several devices hold the same array, Orbax would let each of them write
        # a slice, and compile a program for each array (7 s of a first save on eight
        # devices). It pays only where it shares the writing among processes.
        type_handlers.register_type_handler(
            jax.Array,
            type_handlers.ArrayHandler(use_replica_parallel=jax.process_count() > 1),
            override=True,
        )
        handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
        # without compression: weights hardly shrink, and it takes five times as long
        tree_handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        handlers.add(None, ocp.args.PyTreeSave, tree_handler)
        handlers.add(None, ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every,
            cleanup_tmp_directories=True,
            # the first process calls it when all files of a step are complete, before
            # the step gets its name
            async_options=ocp.AsyncOptions(post_finalization_callback=self._finish),
        )
        with _file_errors(self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, handler_registry=handlers
            )

    def save(self, step: int, meta: dict[str, Any], **items: Any) -> None:
        """Starts to save a step; a failure of the save before it is raised here."""
        args = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        args["meta"] = ocp.args.JsonSave(meta)
        self.wait()
        self._step = step
        with _file_errors(self.directory):
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def check(self) -> None:
        """Raises what has failed in the background, without waiting."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits until the save in progress is complete."""
        with _file_errors(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends Orbax's threads."""
        self.wait()
        with _file_errors(self.directory):  # it raises a failure of before once more
            self._manager.close()

    def _finish(self) -> None:
        unnamed = self.directory.glob(f"{self._step}.orbax-checkpoint-tmp*")
        write_checksums(next(unnamed, self.directory / str(self._step)))


def save_step(directory: Path, step: int, meta: dict[str, Any], **items: Any) -> None:
    """Saves one step, and waits until it is complete."""
    checkpoints = Checkpoints(directory)
    checkpoints.save(step, meta, **items)
    checkpoints.close()


def _require_item(directory: Path, step: int, item: str) -> epath.Path:
    """Returns the path of an item that is there and intact."""
    require_intact(directory, step, {item})
    if item not in items(directory, step):
        raise UserError(f"the checkpoint {directory}/{step} has no {item!r}")
    return as_path(directory) / str(step) / item


def _require_intact_everywhere(
    directory: epath.Path, step: int, older: list[int]
) -> None:
    """Refuses a step that any process finds damaged, in all of them alike."""
    reason = None
    try:
        require_intact(directory, step)
    except DamagedCheckpoint as error:
        reason = error.reason
    has_older = any(has_checksums(directory / str(number)) for number in older)
    if has_older and not has_checksums(directory / str(step)):
        reason = "it has no checksums, though an older step has"
    for process, other in enumerate(multihost.all_gather(reason)):
        if other is not None and reason is None:
            reason = f"process {process} says: {other}"
    if reason is not None:
        raise DamagedCheckpoint(directory, step, reason)


def _set_aside(directory: epath.Path, step: int) -> epath.Path:
    """Renames a step so that it is none any more, and returns its new path."""
    aside = directory / f"{step}.damaged"
    multihost.barrier()  # all have looked before the first process renames
    if multihost.is_primary():
        remove(aside)  # one of before
        (directory / str(step)).rename(aside)
    multihost.barrier()
    return aside


@contextlib.contextmanager
def _file_errors(directory: Path, step: int | None = None) -> Iterator[None]:
    """Turns what the file system refuses into one line; step: the one that is read."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:
        # tensorstore raises ValueError: RESOURCE_EXHAUSTED: ...: No space left [os_...
        system = re.search(r": ([^:\[]+) \[os_error_code=", str(error))
        is_missing = step is not None and isinstance(error, FileNotFoundError)
        if system or (isinstance(error, OSError) and not is_missing):
            reason = system[1] if system else error.strerror or error
            raise UserError(f"{directory}: {reason}") from error
        if is_missing or (step is not None and re.match(r"[A-Z_]{5,}: ", str(error))):
            raise DamagedCheckpoint(directory, step, f"{str(error)[:100]}") from error
        raise
