"""Processes that read records, where decoding is more than the threads can do.

PIL decodes without holding Python's lock, but a fourth of the work on a small image
holds it, so threads stop being faster at a handful. These are not grain's processes:
each of those imports jax, by grain/_src/core/profiler.py and by running the script.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
import warnings
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess

import numpy as np

from sit_jax.data.reading import read
from sit_jax.errors import UserError

LOCK = threading.Lock()
# After a kill Python's tracker removes the locks that the processes shared. That is all
# right, and it need not say so below the last line.
QUIET = "ignore::UserWarning:multiprocessing.resource_tracker"


class Workers:
    """workers(ids, mirrors) is read(source, ids, mirrors), shared among processes."""

    def __init__(self, source, count, read=read):
        self._count, self._read = count, read
        if QUIET not in sys.warnoptions:
            sys.warnoptions.append(QUIET)  # which the tracker is started with
        self._pool = ProcessPoolExecutor(count, _Context(), _begin, (source,))

    def __call__(self, ids, mirrors):
        size = -(-len(ids) // self._count)
        parts = range(0, len(ids), size)
        try:
            begun = [self._begin(slice(at, at + size), ids, mirrors) for at in parts]
            done = [each.result() for each in begun]
        except BrokenProcessPool as error:
            raise UserError(
                "a process that reads data has died; is there enough memory? "
                "fewer workers need less"
            ) from error
        broken = {}
        for _, found in done:
            broken |= found
        whole = lambda name: np.concatenate([rows[name] for rows, _ in done])
        return {name: whole(name) for name in done[0][0]}, broken

    def _begin(self, part, ids, mirrors):
        return self._pool.submit(_call, self._read, ids[part], mirrors[part])

    def close(self):
        self._pool.shutdown(cancel_futures=True)


class _Process(SpawnProcess):
    def start(self):
        with _no_script():
            super().start()


class _Context(SpawnContext):
    Process = _Process


@contextlib.contextmanager
def _no_script():
    """A new process runs the file that was started again, and so imports all of it."""
    with LOCK:
        script = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = script


def _begin(source):
    """In the new process, before it reads anything."""
    global _source
    _source = source
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.filterwarnings("ignore", module="PIL")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)


def _call(read, ids, mirrors):
    return read(_source, ids, mirrors)
