"""Saves steps in the background, and says so when that has failed."""

from functools import partial

import orbax.checkpoint as ocp

from sit_jax.checkpoint.handling import TREES, handlers, plainly
from sit_jax.checkpoint.sums import write_sums
from sit_jax.places import absolute


class Checkpoints:
    """The steps in one directory. Saving is asynchronous; close() waits for it.

    items: names of those that will be saved, if there are averages at several rates.
    Arrays are not compressed: weights hardly shrink, and it takes five times as long.
    """

    def __init__(self, directory, keep_last=None, keep_every=None, items=()):
        self.directory, self._saving = absolute(directory), None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep_last,
            keep_period=keep_every,
            cleanup_tmp_directories=True,
            # called in the background by the first process, when all files of a step
            # are complete and it has not yet got its name
            async_options=ocp.AsyncOptions(post_finalization_callback=self._add_sums),
        )
        plain = partial(ocp.PyTreeCheckpointHandler, use_compression=False)
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
            self._saving = step
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
