"""Reads and writes files on a disk or in a Google bucket (gs://BUCKET/NAME).

A path in a bucket is an `etils.epath.Path`, which has the methods of `pathlib.Path`.
But a bucket is no disk: nothing is renamed at once, nothing is appended to, nothing is
locked, and folders are only what names have in common. So an output for a bucket is
written on this machine and uploaded when it is whole.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from etils import epath

from sit_jax.errors import UserError, first_line, hush

AnyPath: TypeAlias = Path | epath.Path
PathLike = str | os.PathLike

# Orbax's: in a bucket, a checkpoint step that has this file is complete.
COMMIT_FILE = "commit_success.txt"
STORAGE_LIBRARIES = ("gcsfs.", "aiohttp.", "google.auth.", "google.api_core.")


def as_path(path: PathLike) -> AnyPath:
    """Returns a path of this machine, with ~ replaced, or of a bucket.

    Raises:
        UserError: The storage is of another kind, or the bucket does not answer.
    """
    if not is_remote(path):
        return local_path(path)
    name = str(path).rstrip("/")
    if not re.fullmatch(r"gs://[a-z0-9][-a-z0-9_.]+(/[^/]+)*", name):
        raise UserError(f"{path} is no gs://BUCKET/NAME")
    require_bucket(name.split("/")[2])
    return epath.Path(name)


def local_path(path: PathLike) -> Path:
    """Returns a path of this machine, with ~ replaced.

    Raises:
        UserError: It is an address, which would name a folder like "gs:".
    """
    if match := re.match(r"([a-z][a-z0-9+.-]+)://", str(path)):
        copy = "gcloud storage cp or gcsfuse" if match[1] == "gs" else "copy or mount"
        raise UserError(f"{path}: only paths of files are taken here; {copy} it first")
    return Path(path).expanduser()


def absolute_path(path: PathLike) -> AnyPath:
    """Returns as_path(path), starting at the root."""
    path = as_path(path)
    return path if is_remote(path) else path.absolute()


def is_remote(path: PathLike) -> bool:
    """Returns whether a path is in a bucket."""
    return str(path).startswith("gs://")


# ---- writing ----


@contextlib.contextmanager
def atomic_write(path: PathLike) -> Iterator[Path]:
    """Gives a local path of the same name; what is written there replaces `path`.

    It may be a file or a folder. What was at `path` stays until the block has ended,
    and stays for good if it raises. A file keeps the permissions of the one before.
    """
    path = as_path(path)
    with atomic_writes([path]) as folder:
        yield folder / path.name


@contextlib.contextmanager
def atomic_writes(paths: Sequence[AnyPath]) -> Iterator[Path]:
    """Gives a local folder; files of the names of `paths` in it replace them.

    None of them is touched before all are written. The first is replaced last.
    """
    parent = None if is_remote(paths[0]) else paths[0].parent
    if parent:
        parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{paths[0].name}."
    with tempfile.TemporaryDirectory(
        prefix=prefix, dir=parent, ignore_cleanup_errors=True
    ) as folder:
        yield Path(folder)
        for path in reversed(paths):
            source = Path(folder) / path.name
            _replace_remote(source, path) if is_remote(path) else _replace(source, path)


def _replace(source: Path, target: Path) -> None:
    if target.is_file() and source.is_file():
        shutil.copymode(target, source)
    if not target.is_dir() or target.is_symlink():
        os.replace(source, target)
        return
    # a folder with content cannot be renamed over
    old = Path(tempfile.mkdtemp(dir=source.parent)) / "old"
    try:
        os.rename(target, old)
        os.rename(source, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise


def _replace_remote(source: Path, target: epath.Path) -> None:
    if target.is_dir():
        remove(target)
    upload(source, target)


@contextlib.contextmanager
def lock(folder: PathLike, name: str = "lock") -> Iterator[None]:
    """Holds folder/.NAME; the system gives it back when the process ends, however.

    A folder that is not there is made, and removed if it is empty in the end. In a
    bucket nothing is locked.

    Raises:
        UserError: Another process holds it, or it cannot be made. A symbolic link in
            its place is not followed.
    """
    import filelock

    path = as_path(folder) / f".{name}"
    if is_remote(path):
        yield
        return
    new = [parent for parent in path.parents if not parent.exists()]
    held = filelock.FileLock(path, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except filelock.Timeout as error:
        owner = path.read_text(errors="replace")[:200] or "another process"
        raise UserError(
            f"{folder} is in use by {owner}; wait for it, or end it"
        ) from error
    except OSError as error:
        reason = f"{error.filename or path}: {error.strerror or error}"
        raise UserError(f"{reason}; name another place") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        held.release()
        with contextlib.suppress(OSError):
            for parent in new:
                parent.rmdir()


def is_taken(path: AnyPath) -> bool:
    """Returns whether there is anything at a path, even a broken link."""
    return path.exists() if is_remote(path) else os.path.lexists(path)


def require_free(path: PathLike, overwrite: bool) -> AnyPath:
    """Returns the absolute path of an output that may be written.

    Raises:
        UserError: Something is there and may not be overwritten, or nothing can be
            written there.
    """
    path = absolute_path(path)
    if is_taken(path) and not overwrite:
        raise UserError(f"{path} exists; --overwrite replaces it")
    require_writable(path)
    return path


def require_writable(path: PathLike) -> None:
    """Refuses a path below a file, or below a folder that may not be written to."""
    path = as_path(path)
    if is_remote(path):
        return
    folder = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not folder.is_dir():
        raise UserError(f"{path}: {folder} is a file and no folder; name another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {folder} is not writable; name another place")


def require_space(path: PathLike, size: float) -> None:
    """Refuses to begin an output of `size` bytes that the disk cannot hold."""
    path, folder = absolute_path(path), Path(tempfile.gettempdir())
    if not is_remote(path):
        folder = next(parent for parent in path.parents if parent.is_dir())
    if (free := shutil.disk_usage(folder).free) < size:
        raise UserError(
            f"{folder} has {free / 1e9:.3g} GB free, {path} needs {size / 1e9:.3g} GB; "
            "make space, or name another place"
        )


# ---- reading ----


def parse_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text; whatever is wrong with it is a ValueError."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: PathLike) -> Any:
    """Returns the value of a JSON file."""
    try:
        return parse_json(as_path(path).read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def write_json(path: PathLike, value: Any) -> None:
    """Writes a JSON file that is never half there."""
    with atomic_write(path) as name:
        name.write_text(json.dumps(value, indent=2))


def sha256(path: AnyPath) -> str:
    """Returns the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_version(path: AnyPath) -> tuple[int, Any]:
    """Returns the size in bytes, and a value that changes when the content does."""
    if not is_remote(path):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    info = bucket_storage().info(str(path))
    return info["size"], str(info.get("generation") or info.get("created"))


def file_size(path: AnyPath) -> int:
    """Returns the size of a file in bytes."""
    return file_version(path)[0]


def list_files(folder: AnyPath) -> dict[str, int]:
    """Returns the bytes of all files below a folder, by name relative to it, sorted."""
    if is_remote(folder):
        start = str(folder).removeprefix("gs://") + "/"
        infos = bucket_storage().find(str(folder), detail=True)
        sizes = {n.partition(start)[2]: info["size"] for n, info in infos.items()}
        sizes.pop("", None)  # a folder's own object, as consoles make them
    else:
        files = (file for file in folder.rglob("*") if file.is_file())
        sizes = {f.relative_to(folder).as_posix(): f.stat().st_size for f in files}
    return dict(sorted(sizes.items()))


# ---- moving ----


def upload(source: Path, target: epath.Path) -> None:
    """Copies a file, or the files of a folder, to a bucket, the commit file last."""
    if source.is_file():
        bucket_storage().put_file(str(source), str(target))
        return
    for name in sorted(list_files(source), key=lambda name: name.endswith(COMMIT_FILE)):
        bucket_storage().put_file(str(source / name), f"{target}/{name}")


def download(source: epath.Path, target: Path) -> None:
    """Copies a file from a bucket."""
    bucket_storage().get_file(str(source), str(target))


def move(source: AnyPath, target: AnyPath) -> None:
    """Renames a folder; in a bucket it is copied, and removed when all is there."""
    if not is_remote(source):
        source.rename(target)
        return
    for name in list_files(source):
        bucket_storage().cp_file(f"{source}/{name}", f"{target}/{name}")
    remove(source)


def remove(path: AnyPath) -> None:
    """Removes a file or a folder if it is there; its commit file before the rest."""
    if is_remote(path):
        (path / COMMIT_FILE).unlink(missing_ok=True)
        if path.exists():
            bucket_storage().rm(str(path), recursive=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- buckets ----


@functools.cache
def bucket_storage() -> Any:
    """Returns the file system of all buckets, without a cache of listings."""
    import fsspec

    hush("gcsfs")  # what it logs, it raises too
    hush("fsspec")
    fsspec.config.conf.setdefault("gcs", {}).update(use_listings_cache=False)
    try:
        return fsspec.filesystem("gcs", finalize_on_close=True)  # as epath asks for it
    except ImportError as error:
        raise UserError("gs:// needs gcsfs: pip install gcsfs") from error


@functools.cache
def require_bucket(name: str) -> None:
    """Refuses a bucket that cannot be reached, or not by this user."""
    try:
        bucket_storage().info(name)
    except FileNotFoundError as error:
        reason = "there is no such bucket, or it may not be seen"
        raise UserError(f"gs://{name}: {reason}; {_storage_remedy()}") from error
    except Exception as error:  # of half a dozen libraries
        reason = first_line(error)[:200]
        raise UserError(f"gs://{name}: {reason}; {_storage_remedy()}") from error


def describe_storage_error(error: BaseException) -> str | None:
    """Returns an exception of talking to a bucket in one line, None for any other."""
    if not f"{type(error).__module__}.".startswith(STORAGE_LIBRARIES):
        return None
    return f"Google Cloud Storage: {first_line(error)[:200]}; {_storage_remedy()}"


def _storage_remedy() -> str:
    if host := os.environ.get("STORAGE_EMULATOR_HOST"):
        return f"STORAGE_EMULATOR_HOST={host} is where it was looked for"
    return "look at its name, the network and gcloud auth application-default login"
