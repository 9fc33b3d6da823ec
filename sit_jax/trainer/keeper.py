"""Keeps a run's states, and stops it when that fails or a device has gone astray."""

import time

from sit_jax.trainer.start import pack


class Keeper:
    """saved: Checkpoints; watch: Replicas; past: History; about: JSON for the meta."""

    def __init__(self, saved, watch, past, about, decay):
        self._saved, self._watch, self._past = saved, watch, past
        self._about, self._decay = about, decay

    def compile(self, state):
        """All that a save needs."""
        self._watch.compile(state)

    def look(self, step, state):
        """Cheap, after every step: raises what has gone wrong since the last one."""
        self._saved.check()
        if self._watch.due(step):
            self._watch.check(step, state)

    def save(self, step, state):
        """-> seconds until the state was handed over; the writing goes on beside."""
        begun = time.perf_counter()
        self._watch.check(step, state)
        items, meta = pack(state, self._decay)
        meta = {**self._about, **self._past.meta(step), **meta}
        self._saved.save(step, meta, **items)
        return time.perf_counter() - begun
