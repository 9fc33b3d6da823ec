"""The newest step of a run that is whole; damaged ones after it lose their names."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from sit_jax.checkpoint.folder import set_aside, steps, unfinished
from sit_jax.checkpoint.sums import has_sums
from sit_jax.checkpoint.whole import Damaged, require_whole
from sit_jax.places import place


def newest_whole(directory, use):
    """-> use(step) of the newest step that is not damaged, and a sentence about it.

    Newer ones are kept under another name. If none is whole, the newest is refused and
    all stay as they are. Several processes come to the same step.
    """
    cut_off, damaged = unfinished(directory), []
    for step in reversed(steps(directory)):
        try:
            _require_whole(directory, step)
            used = use(step)
        except Damaged as error:
            damaged.append(error)
            continue
        said = [f"goes on from step {step}"]
        if not has_sums(place(directory) / str(step)):
            said.append("it has no sums, so nothing tells whether it is damaged")
        for error in damaged:
            aside = _set_aside(directory, error.step)
            said.append(f"WARNING: step {error.step} is damaged ({error.why}); {aside}")
        said += [f"the save of step {n} was cut off and is removed" for n in cut_off]
        return used, "; ".join(said)
    raise damaged[0]


def _require_whole(directory, step):
    """Refuses a step that any process finds damaged, in all of them alike."""
    mine = None
    try:
        require_whole(directory, step)
    except Damaged as error:
        mine = error
    if jax.process_count() > 1:
        bad = multihost_utils.process_allgather(np.asarray(mine is not None))
        if bad.any() and mine is None:
            mine = Damaged(directory, step, f"so process {int(np.argmax(bad))} says")
    if mine:
        raise mine


def _set_aside(directory, step):
    """-> what has become of the step."""
    name = f"{step}.damaged"
    if jax.process_index() == 0:
        name = set_aside(directory, step).name
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{step} set aside")
    return f"kept as {name}, which may be removed"
