"""Reads steps: only the items asked for, and only what is as it was saved."""

import contextlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from sit_jax.checkpoint.folder import items, steps
from sit_jax.checkpoint.handling import TREES, handlers, plainly
from sit_jax.checkpoint.trees import compare, named
from sit_jax.checkpoint.whole import require_whole
from sit_jax.errors import UserError
from sit_jax.places import absolute


def read_meta(directory, step):
    with _reader(directory, step, ["meta"]) as manager:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return manager.restore(step, args=args)["meta"]


def load(directory, step, **like):
    """Only the items asked for, shaped and sharded like the trees given.

    The saved shapes are compared first: what is missing, extra or misshapen is listed.
    """
    with _reader(directory, step, like) as manager:
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
    with _reader(directory, step, [item], ocp.PyTreeCheckpointHandler) as manager:
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


@contextlib.contextmanager
def _reader(directory, step, wanted, tree_handler=ocp.StandardCheckpointHandler):
    """An Orbax manager of the step, once the files of the wanted items are right."""
    if step not in steps(directory):
        raise UserError(f"no checkpoint of step {step} in {directory}")
    require_whole(directory, step, wanted)
    found = items(directory, step).intersection(
        wanted
    )  # Orbax reads about all it knows
    trees = {name for name in found if name in TREES or name.startswith("ema_")}
    options = ocp.CheckpointManagerOptions(read_only=True)
    with (
        plainly(directory, step),
        ocp.CheckpointManager(
            absolute(directory),
            options=options,
            item_handlers=handlers(trees, tree_handler),
        ) as manager,
    ):
        yield manager
