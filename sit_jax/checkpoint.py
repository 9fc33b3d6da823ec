"""Checkpoints: step directories of the items `params`, `ema`, `opt_state`, `meta`.

There may be averages at other rates, `ema_0.999`, and what the choice of times learns
from, `losses`. Ported ones may have `constants`: what a torch file holds beside the
parameters.

Only this file knows Orbax. A step appears under its number when it is complete, so
what a kill interrupts is never mistaken for a checkpoint. `meta` is JSON: the config,
the step and what else describes the weights; it is enough to build the model.
"""

import contextlib
import logging
import re
from functools import partial
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from sit_jax.errors import UserError

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates; it also raises

TREES = ("params", "ema", "opt_state", "losses", "constants")


class Checkpoints:
    """The steps in one directory. Saving is asynchronous; close() waits for it.

    items: names of those that will be saved, if there are averages at several rates.
    Arrays are not compressed: weights hardly shrink, and it takes five times as long.
    """

    def __init__(self, directory, keep_last=None, keep_every=None, items=()):
        self.directory = Path(directory).expanduser().absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last, keep_period=keep_every, cleanup_tmp_directories=True
        )
        plain = partial(ocp.PyTreeCheckpointHandler, use_compression=False)
        with _plainly(self.directory):
            handlers = _handlers({*TREES, *items}, plain)
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=handlers
            )

    def save(self, step, meta, **items):
        """Starts saving; a failure of the save before this one is raised here."""
        args = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        args["meta"] = ocp.args.JsonSave(meta)
        with _plainly(self.directory):
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def wait(self):
        with _plainly(self.directory):
            self._manager.wait_until_finished()

    def close(self):
        with _plainly(self.directory):
            self._manager.wait_until_finished()
            self._manager.close()

    def latest(self):
        """The newest complete step, or None."""
        return self._manager.latest_step()


def steps(directory):
    """Complete steps in a checkpoint directory, ascending; [] where there is none."""
    directory = Path(directory).expanduser()
    if not directory.is_dir():
        return []
    names = (child.name for child in directory.iterdir() if child.is_dir())
    return sorted(int(name) for name in names if name.isdecimal())


def find(path):
    """A workdir, checkpoint directory or one of its steps -> (directory, step).

    Of several steps, the newest.
    """
    path = Path(path).expanduser()
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
    return {child.name for child in (Path(directory) / str(step)).iterdir()}


def read_meta(directory, step):
    with _reader(directory, step) as manager:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return manager.restore(step, args=args)["meta"]


def load(directory, step, **like):
    """Only the items asked for, shaped and sharded like the trees given.

    The saved shapes are compared first: what is missing, extra or misshapen is listed.
    """
    with _reader(directory, step) as manager:
        saved = manager.item_metadata(step)
        for name, tree in like.items():
            if name not in saved or saved[name] is None:
                raise UserError(f"the checkpoint {directory}/{step} has no {name!r}")
            compare(f"{directory}/{step}, {name}", saved[name].tree, tree)
        args = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
        found = manager.restore(step, args=ocp.args.Composite(**args))
        return {name: found[name] for name in like}


def leaves(directory, step, item, like):
    """Yields (path, array) of one item, the largest first, little of it at a time.

    like: a tree of shapes; the paths are those of named(like).
    """
    with _reader(directory, step, ocp.PyTreeCheckpointHandler) as manager:
        saved = manager.item_metadata(step)
        if item not in saved or saved[item] is None:
            raise UserError(f"the checkpoint {directory}/{step} has no {item!r}")
        compare(f"{directory}/{step}, {item}", saved[item].tree, like)
        for paths in _groups(named(like)):
            args = ocp.args.Composite(**{item: _only(paths, like)})
            found = named(manager.restore(step, args=args)[item])
            for path in paths:
                yield path, np.asarray(found.pop(path))  # held by the caller alone


def _groups(shapes, most=2**26):
    """Paths from the largest leaf to the smallest, as many together as make up most."""
    groups, room = [], 0
    for path in sorted(shapes, key=lambda path: -shapes[path].size):
        size = shapes[path].size * shapes[path].dtype.itemsize
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(path)
        room -= size
    return groups


def _only(paths, like):
    """Arguments that restore these leaves of an item and leave the others."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    names, (shapes, tree) = list(named(like)), jax.tree.flatten(like)
    asked = [name in paths for name in names]
    wanted = [x if a else ocp.PLACEHOLDER for a, x in zip(asked, shapes, strict=True)]
    args = [
        ocp.ArrayRestoreArgs(sharding=place, dtype=x.dtype) if a else ocp.RestoreArgs()
        for a, x in zip(asked, shapes, strict=True)
    ]
    wanted, args = tree.unflatten(wanted), tree.unflatten(args)
    return ocp.args.PyTreeRestore(wanted, restore_args=args)


def named(tree):
    """-> {keys that lead to a leaf, joined by slashes: leaf}."""
    keystr = jax.tree_util.keystr
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def compare(where, found, wanted, most=8):
    """Refuses a tree whose names or shapes are not the wanted ones, listing them."""
    found, wanted = _shapes(found), _shapes(wanted)
    lines = [f"missing {name}" for name in wanted if name not in found]
    lines += [f"extra {name}" for name in found if name not in wanted]
    lines += [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    if lines:
        more = f"; and {len(lines) - most} more" if len(lines) > most else ""
        listed = "; ".join(lines[:most])
        raise UserError(f"{where} is of another architecture: {listed}{more}")


def _shapes(tree):
    return {path: tuple(np.shape(leaf)) for path, leaf in named(tree).items()}


@contextlib.contextmanager
def _reader(directory, step, tree_handler=ocp.StandardCheckpointHandler):
    if step not in steps(directory):
        raise UserError(f"no checkpoint of step {step} in {directory}")
    found = items(directory, step)
    trees = {name for name in found if name in TREES or name.startswith("ema_")}
    handlers = _handlers(trees, tree_handler)
    options = ocp.CheckpointManagerOptions(read_only=True)
    with (
        _plainly(Path(directory)),
        ocp.CheckpointManager(
            Path(directory).absolute(), options=options, item_handlers=handlers
        ) as manager,
    ):
        yield manager


def _handlers(names, of_tree):
    return {name: of_tree() for name in names} | {"meta": ocp.JsonCheckpointHandler()}


@contextlib.contextmanager
def _plainly(directory):
    """Turns what the file system refuses into one line."""
    try:
        yield
    except OSError as error:
        where = error.filename or directory
        raise UserError(f"{where}: {error.strerror or error}") from error
    except ValueError as error:  # what writing and reading arrays raises
        if reason := re.search(r": ([^:\[]+) \[os_error_code=", str(error)):
            raise UserError(f"{directory}: {reason[1]}") from error
        if not re.match(r"[A-Z_]{5,}: ", str(error)):
            raise
        raise UserError(
            f"a step in {directory} is damaged ({str(error)[:100]} ...); without it, "
            "the step before is the newest"
        ) from error
