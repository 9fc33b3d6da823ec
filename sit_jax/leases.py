"""A lock in a bucket: an object that its holder renews, and that ends without that."""

import contextlib
import json
import os
import secrets
import sys
import threading
import time

from sit_jax import json_text, places

RENEWED = 20.0  # seconds between two renewals
EXPIRED = 90.0  # seconds after the last one in which the holder may still be alive


@contextlib.contextmanager
def leased(path, owner, is_gone, refuse):
    """Holds the object at `path`.

    owner: JSON about this process. is_gone(owner): whether another one is known to have
    ended. refuse(owner): raises, for one that has not.
    """
    mine = {**owner, "token": secrets.token_hex(8)}
    while not _made(path, mine):
        held = read(path)
        if time.time() - held.get("renewed", 0) < EXPIRED and not is_gone(held):
            refuse(held)
        path.unlink(missing_ok=True)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(path, mine, ended), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        ended.set()
        renewing.join()
        if read(path).get("token") == mine["token"]:
            path.unlink(missing_ok=True)


def read(path):
    """What a lease's object says; {} of none."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        found = json_text.parse(path.read_text())
        return found if isinstance(found, dict) else {}
    return {}


def _made(path, mine):
    try:
        places.create(path, _dated(mine))
    except FileExistsError:
        return False
    return True


def _renew(path, mine, ended):
    """Until ended; a process that has been taken for dead may not write any more."""
    while not ended.wait(RENEWED):
        try:
            if read(path).get("token", mine["token"]) != mine["token"]:
                print(f"{path} is held by another process now", file=sys.stderr)
                return os._exit(2)
            path.write_text(_dated(mine))
        except Exception as error:  # the network; the next renewal may succeed
            words = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"WARNING: {path} is not renewed ({words})", file=sys.stderr)


def _dated(owner):
    return json.dumps({**owner, "renewed": time.time()})
