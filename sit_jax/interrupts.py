"""Signals that Python does not act on.

XLA compiles for minutes, and only when it returns does Python hear of a signal; an
exception raised while Python collects garbage (JAX has a callback there) is dropped.
So a thread hears of the signal too, by the file descriptor that Python's own handler
writes to, and after a while ends the process. Outputs appear by rename: nothing is
half written then, and the kernel gives locks back.
"""

import contextlib
import functools
import os
import signal
import threading
import time

GRACE = 3.5  # seconds
MAKING = 1.0  # seconds that what is being made or removed is waited for
ENDING = {signal.SIGINT, signal.SIGTERM}  # the latter where Python handles it

_patient = 0  # how many ask for all the time they need, as to save a step
_open = 0  # blocks that the main thread is in
_left = 0  # those that it has left: it is alive, and Python has told it of the signal
_left_behind = []  # what to call before the process ends from here
_making = threading.RLock()


def watch(end):
    """end(): says why, and ends the process; called in a thread."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(reading, end), daemon=True).start()


@contextlib.contextmanager
def patience():
    """Inside, a first signal may wait for ever; a second one may not."""
    with _counted(1):
        yield


@contextlib.contextmanager
def impatience():
    """Inside, patience is suspended: there is nothing to save."""
    with _counted(-1):
        yield


@contextlib.contextmanager
def made(make, remove):
    """Gives make(), of which remove() is called however block or process end.

    tidy() waits for both: it would miss what a thread is just making, and end the
    process in the middle of what a thread is just removing.
    """
    with _making:
        undo = functools.partial(remove, thing := make())
        _left_behind.append(undo)
    try:
        yield thing
    finally:
        with _making:
            _left_behind.remove(undo)
            undo()


def tidy():
    """Removes what made() gave, for a process that is about to end where it is."""
    waited = _making.acquire(timeout=MAKING)
    for remove in reversed(_left_behind):
        remove()
    if waited:
        _making.release()


@contextlib.contextmanager
def _counted(more):
    global _patient, _open, _left
    _patient, _open = _patient + more, _open + 1
    try:
        yield
    finally:
        _patient, _open, _left = _patient - more, _open - 1, _left + 1


def _wait(reading, end):
    heard = 0
    while signals := os.read(reading, 16):
        count = len(ENDING.intersection(signals))
        heard += count
        if not count or (heard == 1 and _patient):
            continue
        # outside all blocks an exception was raised, and who still runs has lost it
        inside, before = _open, _left
        time.sleep(GRACE)
        if heard > 1 or not inside or before == _left:
            tidy()
            end()
