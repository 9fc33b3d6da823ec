"""Outputs that are whole or not there: written elsewhere, then renamed, or uploaded.

A draft is beside what it becomes, or in the folder for temporary files if that is in a
bucket.
"""

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from sit_jax import places
from sit_jax.errors import UserError
from sit_jax.interrupts import made
from sit_jax.places import absolute, in_bucket, place

FULL = (errno.ENOSPC, errno.EDQUOT)

_open = set()  # drafts of this process


def require_free(path, overwrite):
    """-> absolute place; refuses what exists already unless it may be overwritten.

    What killed processes have left of it is cleared away before.
    """
    path = absolute(path)
    clear(path)
    if is_taken(path) and not overwrite:
        raise UserError(f"{path} exists; --overwrite replaces it")
    require_writable(path)
    return path


def is_taken(path):
    """Whether there is anything at a place, be it a broken link."""
    return path.exists() if in_bucket(path) else os.path.lexists(path)


def require_writable(path):
    """Refuses a path below a file, or below a folder that may not be written to.

    What a bucket allows is found out by writing there.
    """
    if in_bucket(path):
        place(path)
        return
    folder = next(parent for parent in Path(path).absolute().parents if _exists(parent))
    if not folder.is_dir():
        raise UserError(f"{path}: {folder} is a file and no folder; name another place")
    known = os.access in os.supports_effective_ids
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=known):
        raise UserError(f"{path}: {folder} is not writable; name another place")


def _exists(path):
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except PermissionError:
        return True
    return True


def require_space(path, size):
    """Refuses to begin what the disk of the nearest existing folder cannot hold."""
    folder = _disk(path)
    if (free := shutil.disk_usage(folder).free) < size:
        raise UserError(
            f"{folder} has {free / 1e9:.3g} GB free, {path} needs {size / 1e9:.3g} GB; "
            "make space, or name another place"
        )


def _disk(path):
    """The folder that a path's draft will be in, or the nearest above it."""
    if in_bucket(path):
        return Path(tempfile.gettempdir())
    return next(parent for parent in Path(path).parents if parent.is_dir())


@contextlib.contextmanager
def roomy(path, needed):
    """Says of a disk that is full meanwhile what is lacking; needed(): bytes still."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        folder = _disk(path)
        raise UserError(
            f"{error.strerror}: {path} still needs {needed():,} bytes, "
            f"{shutil.disk_usage(folder).free:,} are free; make space, and the same "
            "command goes on"
        ) from error


def clear(path):
    """Removes drafts of `path` by processes that are dead.

    One that was killed between the two renames that replace a folder had moved the
    folder aside: it gets its name back.
    """
    if in_bucket(path):
        return
    for old in _left(path, re.escape(path.name), re.escape(".old")):
        if os.path.lexists(path):
            shutil.rmtree(old, ignore_errors=True)
            continue
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            os.rename(old, path)
            print(f"{path} is back: a killed run had moved it aside", file=sys.stderr)
    for name in _left(path, re.escape(path.stem), f"({re.escape(path.suffix)})?"):
        _remove(name)


def _left(path, begin, end):
    """What is named after a dead process, beside a path."""
    pattern = re.compile(rf"\.{begin}\.(\d+){end}")
    try:
        beside = list(path.parent.iterdir())
    except OSError:  # nothing there, or not ours to see
        return []
    found = ((each, pattern.fullmatch(each.name)) for each in beside)
    return [e for e, match in found if match and e not in _open and _dead(match[1])]


def _dead(process):
    """Whether no other process has this number; containers give the same ones again."""
    try:
        if int(process) != os.getpid():
            os.kill(int(process), 0)
            return False
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return True


@contextlib.contextmanager
def draft(path):
    """Gives a local path, of the same ending, whose content replaces `path` in the end.

    What was at `path` stays until then; after an error the draft is removed.
    """
    path = place(path)
    if in_bucket(path):
        with drafts([path]) as folder:
            yield folder / path.name
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    with _opened(lambda: name):
        yield name
        _replace(name, path)


@contextlib.contextmanager
def drafts(paths):
    """Gives a local folder; files of the names of `paths` in it take their places.

    None of them is touched before all are written, nor after an error. The first of
    the paths is replaced last.
    """

    def make():
        if in_bucket(paths[0]):
            return Path(tempfile.mkdtemp(prefix="sit_jax."))
        folder = paths[0].with_name(f".{paths[0].stem}.{os.getpid()}")
        folder.mkdir(parents=True)
        return folder

    put = _upload if in_bucket(paths[0]) else _replace
    with _opened(make) as folder:
        yield folder
        for path in reversed(paths):
            put(folder / path.name, path)


@contextlib.contextmanager
def _opened(make):
    """Gives make(), a path, and removes what is there in the end, however it comes."""

    def begin():
        name = make()
        _open.add(name)
        return name

    def end(name):
        _open.discard(name)
        _remove(name)

    with made(begin, end) as name:
        yield name


def _upload(name, path):
    """An object is replaced by the new one; a folder has to be removed before."""
    if path.is_dir():
        places.remove(path)
    places.send(name, path)


def _replace(name, path):
    if not path.is_dir() or path.is_symlink():
        os.replace(name, path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    os.rename(path, old)  # a directory with content cannot be renamed over
    os.rename(name, path)
    shutil.rmtree(old)


def _remove(name):
    if name.is_dir():
        shutil.rmtree(name, ignore_errors=True)
    else:
        name.unlink(missing_ok=True)
