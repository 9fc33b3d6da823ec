"""A lock in a bucket: an object that its holder renews, and that ends without that."""

import contextlib
import json
import os
import secrets
import sys
import threading
import time

from sit_jax import interrupts, json_text, places
from sit_jax.errors import LATER, MISTAKE

RENEWED = 20.0  # seconds between two renewals
LATE = 150.0  # seconds without one after which the holder ends itself
EXPIRED = 180.0  # ... and after which another takes over: the clocks may differ by 30
LOOK = 1.0  # seconds from one look at the clock to the next
WAITED = 10.0  # seconds, at the end, for a renewal under way


@contextlib.contextmanager
def leased(path, owner, is_gone, refuse):
    """Holds the object at `path`.

    owner: JSON about this process. is_gone(owner): whether another one is known to have
    ended. refuse(owner): raises, for one that has not.
    """
    mine = {**owner, "token": secrets.token_hex(8)}
    while not _made(path, mine):
        _end_dead(path, is_gone, refuse)
    ended, lease = threading.Event(), _Lease(path, mine)
    beside = [
        threading.Thread(target=run, args=(ended,), daemon=True)
        for run in (lease.renew, lease.watch)
    ]
    for each in beside:
        each.start()
    try:
        yield
    finally:
        ended.set()
        for each in beside:
            each.join(WAITED)
        _give_back(path, mine["token"])


def read(path):
    """What a lease's object says; {} of none."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        found = json_text.parse(path.read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _give_back(path, token):
    """What a run has done stays done, also where the network has gone meanwhile."""
    try:
        if read(path).get("token") == token:
            path.unlink(missing_ok=True)
    except Exception as error:
        until = f"nobody else may write there for {EXPIRED:g} s"
        print(f"WARNING: {path} stays ({_said(error)}): {until}", file=sys.stderr)


def _made(path, mine):
    try:
        places.create(path, _dated(mine))
    except FileExistsError:
        return False
    return True


def _end_dead(path, is_gone, refuse):
    """Removes the lease of a holder that is dead, and no other that comes meanwhile."""
    try:
        version = places.version(path)[1]
        held = read(path)
        if time.time() - held.get("renewed", 0) < EXPIRED and not is_gone(held):
            refuse(held)
        places.remove_version(path, version)
    except (FileNotFoundError, FileExistsError):  # another was faster
        return


class _Lease:
    """One that is held: who may be taken for dead must not write any more."""

    def __init__(self, path, mine):
        self._path, self._mine, self._renewed = path, mine, time.time()

    def renew(self, ended):
        while not ended.wait(RENEWED):
            begun, token = time.time(), self._mine["token"]
            try:
                if read(self._path).get("token", token) != token:
                    return _end(f"{self._path} is held by another process now", MISTAKE)
                self._path.write_text(_dated(self._mine))
                self._renewed = begun
            except Exception as error:  # the network; the next renewal may succeed
                words = f"WARNING: {self._path} is not renewed ({_said(error)})"
                print(words, file=sys.stderr)

    def watch(self, ended):
        """Beside it, since a renewal may wait for the network, and a machine stand."""
        while not ended.wait(LOOK):
            if time.time() - self._renewed > LATE:
                words = f"was not renewed for {LATE:g} s: another run may take it"
                return _end(f"{self._path} {words}; the same command goes on", LATER)


def _end(words, code):
    print(words, file=sys.stderr, flush=True)
    interrupts.tidy()
    os._exit(code)


def _said(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _dated(owner):
    return json.dumps({**owner, "renewed": time.time()})
