"""Ctrl-C that Python does not act on.

XLA compiles for minutes, and only when it returns does Python hear of a signal; an
exception raised while Python collects garbage (JAX has a callback there) is dropped.
So a thread hears of the signal too, by the file descriptor that Python's own handler
writes to, and after a while ends the process. Outputs appear by rename: nothing is
half written then, and the kernel gives locks back.
"""

import contextlib
import os
import signal
import threading
import time

GRACE = 3.5  # seconds

_patient = 0  # how many ask for all the time they need, as to save a step


def watch(end):
    """end(): says why, and ends the process; called in a thread."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(reading, end), daemon=True).start()


@contextlib.contextmanager
def patience():
    """Inside, a signal may wait for ever."""
    global _patient
    _patient += 1
    try:
        yield
    finally:
        _patient -= 1


def _wait(reading, end):
    while signals := os.read(reading, 16):
        if signal.SIGINT in signals and not _patient:
            time.sleep(GRACE)
            end()
