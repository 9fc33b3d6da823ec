"""Saves steps in the background, and says so when that has failed."""

import time
from functools import partial

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from sit_jax.checkpoint.handling import TREES, handlers, plainly
from sit_jax.checkpoint.sums import write_sums
from sit_jax.places import absolute

SLICE = 2**20  # bytes of the smallest slice that hosts share the writing of
OTHERS = (int, float, bytes, str, np.number, np.ndarray)  # leaves that are no arrays


class Checkpoints:
    """The steps in one directory. Saving is asynchronous; close() waits for it.

    items: names of those that will be saved, if there are averages at several rates.
    Arrays are not compressed: weights hardly shrink, and it takes five times as long.
    took: seconds of the last save that has ended, in the first process; None before.
    """

    def __init__(self, directory, keep_last=None, keep_every=None, items=()):
        self.directory, self._saving = absolute(directory), None
        self.took, self._begun = None, None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every,
            cleanup_tmp_directories=True,
            # called in the background by the first process, when all files of a step
            # are complete and it has not yet got its name
            async_options=ocp.AsyncOptions(post_finalization_callback=self._add_sums),
        )
        kinds = _kinds(jax.process_count())
        plain = partial(
            ocp.PyTreeCheckpointHandler,
            use_compression=False,
            type_handler_registry=kinds,
        )
        with plainly(self.directory):
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                item_handlers=handlers({*TREES, *items}, plain),
            )

    def save(self, step, meta, **items):
        """Starts saving; a failure of the save before this one is raised here."""
        args = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        args["meta"] = ocp.args.JsonSave(meta)
        with plainly(self.directory):
            self._manager.wait_until_finished()
            self._saving, self._begun = step, time.monotonic()
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)

    def check(self):
        """Raises what has failed in the background; does not wait for what has not."""
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self):
        with plainly(self.directory):
            self._manager.wait_until_finished()

    def close(self):
        with plainly(self.directory):
            self._manager.wait_until_finished()
            self._manager.close()

    def latest(self):
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def _add_sums(self):
        named = self.directory.glob(f"{self._saving}.orbax-checkpoint-tmp*")
        write_sums(next(named, self.directory / str(self._saving)))
        self.took = time.monotonic() - self._begun


def _kinds(processes):
    """Orbax's ways to write each kind of leaf.

    Where several devices hold the same, Orbax lets each write a slice, for which it
    compiles a program of its own, 144 for a small net on eight devices: that alone made
    the first save take 7 s. It is of use only if it shares the work among hosts.
    """
    arrays = type_handlers.ArrayHandler(
        use_replica_parallel=processes > 1, min_slice_bytes_for_replica_parallel=SLICE
    )
    known = ((kind, type_handlers.get_type_handler(kind)) for kind in OTHERS)
    return type_handlers.create_type_handler_registry(*known, (jax.Array, arrays))
