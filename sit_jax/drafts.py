"""Outputs that are whole or not there: written under another name, then renamed."""

import contextlib
import os
import shutil
from pathlib import Path

from sit_jax.errors import UserError
from sit_jax.places import local


def require_free(path, overwrite):
    """-> absolute Path; refuses what exists already unless it may be overwritten."""
    path = local(path).absolute()
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path} exists; --overwrite replaces it")
    require_writable(path)
    return path


def require_writable(path):
    """Refuses a path below a file, or below a folder that may not be written to."""
    folder = next(parent for parent in Path(path).absolute().parents if _exists(parent))
    if not folder.is_dir():
        raise UserError(f"{path}: {folder} is a file and no folder; name another place")
    if not os.access(folder, os.W_OK | os.X_OK):
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
    folder = next(parent for parent in Path(path).parents if parent.is_dir())
    if (free := shutil.disk_usage(folder).free) < size:
        raise UserError(
            f"{folder} has {free / 1e9:.3g} GB free, {path} needs {size / 1e9:.3g} GB"
        )


@contextlib.contextmanager
def draft(path):
    """Gives a path beside `path`, of the same ending, that replaces it in the end.

    What was at `path` stays until then; after an error the draft is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield name
        _replace(name, path)
    finally:
        _remove(name)


@contextlib.contextmanager
def drafts(paths):
    """Gives a folder beside `paths`; files of their names in it take their places.

    None of them is touched before all are written, nor after an error. The first of
    the paths is replaced last.
    """
    folder = paths[0].with_name(f".{paths[0].stem}.{os.getpid()}")
    folder.mkdir(parents=True)
    try:
        yield folder
        for path in reversed(paths):
            _replace(folder / path.name, path)
    finally:
        _remove(folder)


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
