"""One process at a time in a folder: a lock that ends with its holder.

In a bucket it is a lease, which its holder renews.
"""

import contextlib
import errno
import json
import os
import socket
from functools import partial
from pathlib import Path

from sit_jax import json_text
from sit_jax.errors import UserError
from sit_jax.interrupts import made
from sit_jax.leases import leased
from sit_jax.places import in_bucket, place

ABSENT = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # as on some NFS


@contextlib.contextmanager
def alone(folder, name="lock"):
    """Holds folder/.NAME, or refuses and names the process that does.

    A folder that is not there is made, and removed if it is empty in the end.

    The kernel gives the lock back when its holder ends, however it ends. Where a file
    system knows no locks, what the file says counts: a process that is gone, or whose
    number another one has by now, holds nothing; of another machine nobody can tell.
    """
    path = place(folder) / f".{name}"

    def refuse(owner):
        raise UserError(f"{folder} is in use by {_told(owner, path)}")

    lease = (path, _owner(), _is_gone, refuse)
    with leased(*lease) if in_bucket(path) else _locked(path, refuse):
        yield


@contextlib.contextmanager
def _locked(path, refuse):
    new = [folder for folder in path.parents if not os.path.lexists(folder)]

    def take():
        file = _taken(path, refuse)
        file.truncate(0)
        file.write(json.dumps(_owner()))
        file.flush()
        return file

    with made(take, partial(_give_back, path, new)):
        yield


def _give_back(path, folders, file):
    """A lock, and those of these folders, the innermost first, that are empty now."""
    if file.closed:
        return  # given back already: what is there now is another's
    path.unlink(missing_ok=True)
    file.close()
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _opened(path, again=True):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "a+")
    except OSError as error:
        if again and isinstance(error, FileNotFoundError):
            return _opened(path, again=False)  # its maker has just removed the folder
        reason = f"{error.filename or path}: {error.strerror or error}"
        raise UserError(f"{reason}; name another place") from error


def _taken(path, refuse):
    """-> the lock's file, when it is ours."""
    while True:
        file = _opened(path)
        if not _ours(file):
            with file:
                file.seek(0)
                refuse(_read(file.read()))
        # the one before may have removed the file between our opening and locking it
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def _ours(file):
    """Whether the lock is ours now."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in ABSENT:
            raise
        file.seek(0)
        return not _alive(_read(file.read()))
    return True


def _owner():
    process = os.getpid()
    began = {"pid": process, "began": _began(process)}
    return {"host": socket.gethostname(), "space": _space(), **began}


def _alive(owner):
    """Whether the process that wrote a lock runs; one that cannot be seen may."""
    if not _in_sight(owner):
        return bool(owner)
    return owner.get("began") is not None and _began(owner["pid"]) == owner["began"]


def _is_gone(owner):
    """Whether the holder of a lease is known to have ended: on this machine."""
    return _in_sight(owner) and not _alive(owner)


def _in_sight(owner):
    """Whether its number means here what it meant there: containers have their own."""
    space = owner.get("space", _space())
    return owner.get("host") == socket.gethostname() and space == _space()


def _space():
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _began(process):
    """When a process began, in the kernel's ticks; None: there is no such one."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
        return text.rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _read(text):
    try:
        found = json_text.parse(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _told(owner, path):
    who = f"process {owner.get('pid', '?')} on {owner.get('host', 'some machine')}"
    return f"{who}; wait for it, end it, or if it is long gone remove {path}"
