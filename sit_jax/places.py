"""Paths as users write them: of this machine's files, or of a bucket, gs://BUCKET/NAME.

A place in a bucket has the methods of pathlib's Path (it is an etils.epath.Path, as
Orbax uses), but a bucket is no disk:

* Nothing is renamed at once. Instead, an object appears when its upload has ended, and
  whole: what a disk gets under another name first, a bucket gets from a draft on this
  machine (drafts.py). Of files that belong together, the one that readers look for is
  sent last: MARK of a checkpoint's step, as Orbax does.
* Nothing is appended to: a log is kept here and sent again and again (mirrors.py).
* Nothing is locked: a lock is an object that its holder renews (leases.py).
* Folders are what names have in common; none has to be made, and an empty one is none.
"""

import contextlib
import os
import re
import shutil
import time
from pathlib import Path

from sit_jax import buckets
from sit_jax.errors import UserError

LAG = 10.0  # seconds for what another machine has written to appear
MARK = "commit_success.txt"  # Orbax's: in a bucket, a step that has it is complete


def place(path):
    """-> Path of this machine, ~ replaced, or of a bucket, which must answer."""
    if not in_bucket(path):
        return local(path)
    from etils import epath

    name = str(path).rstrip("/")
    if not re.fullmatch(r"gs://[a-z0-9][-a-z0-9_.]+(/[^/]+)*", name):
        raise UserError(f"{path} is no gs://BUCKET/NAME")
    buckets.require_answer(name.split("/")[2])
    return epath.Path(name)


def local(path):
    """-> Path, ~ replaced; refuses addresses, which would name a folder like "gs:"."""
    if match := re.match(r"([a-z][a-z0-9+.-]+)://", str(path)):
        how = "gcloud storage cp it to a disk, or gcsfuse BUCKET DIR"
        remedy = how if match[1] == "gs" else f"mount the {match[1]} storage"
        raise UserError(
            f"{path}: only paths of files are taken here; {remedy}, and give that path"
        )
    return Path(path).expanduser()


def in_bucket(path):
    return str(path).startswith("gs://")


def absolute(path):
    """-> place, from the root on; in a bucket it always is."""
    path = place(path)
    return path if in_bucket(path) else path.absolute()


def make_folder(path):
    if not in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def appears(path):
    """Whether something is there that another machine has written a moment ago.

    NFS remembers for half a minute that a name was free; to list its folder reminds it.
    """
    until = time.monotonic() + LAG
    while not path.exists():
        if in_bucket(path) or time.monotonic() > until:
            return False
        with contextlib.suppress(OSError):
            os.listdir(path.parent)
        time.sleep(0.2)
    return True


def size(path):
    """Bytes of a file."""
    return version(path)[0]


def version(path):
    """Size and time of a file, or what in a bucket tells each of its versions apart."""
    if not in_bucket(path):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    found = buckets.system().info(str(path))
    return found["size"], str(found.get("generation") or found.get("created"))


def files(folder):
    """-> {name relative to a folder: bytes} of all files below it, sorted."""
    if in_bucket(folder):
        start = str(folder).removeprefix("gs://") + "/"
        found = buckets.system().find(str(folder), detail=True)
        sizes = {n.partition(start)[2]: about["size"] for n, about in found.items()}
        sizes.pop("", None)  # a folder's own object, as consoles make them
    else:
        found = (file for file in folder.rglob("*") if file.is_file())
        sizes = {f.relative_to(folder).as_posix(): f.stat().st_size for f in found}
    return dict(sorted(sizes.items()))


def create(path, text):
    """Writes an object that is not there; FileExistsError if it is."""
    buckets.system().pipe_file(str(path), text.encode(), mode="create")


def remove_version(path, version):
    """Removes an object as version() tells it; FileExistsError if it is another now."""
    bucket, _, key = str(path).removeprefix("gs://").partition("/")
    more = {"ifGenerationMatch": version}
    buckets.system().call("DELETE", "b/{}/o/{}", bucket, key, **more)


def send(source, target):
    """Uploads a file, or those of a folder, marks last."""
    if source.is_file():
        buckets.system().put_file(str(source), str(target))
        return
    for name in sorted(files(source), key=lambda name: name.endswith(MARK)):
        buckets.system().put_file(str(source / name), f"{target}/{name}")


def bring(source, target):
    """Downloads an object."""
    buckets.system().get_file(str(source), str(target))


def move(source, target):
    """Renames a folder; in a bucket it is copied, and removed when all is there."""
    if not in_bucket(source):
        source.rename(target)
        return
    for name in files(source):
        buckets.system().cp_file(f"{source}/{name}", f"{target}/{name}")
    remove(source)


def remove(path):
    """Removes a file or a folder, if it is there; a step's mark before the rest."""
    if in_bucket(path):
        (path / MARK).unlink(missing_ok=True)
        if path.exists():
            buckets.system().rm(str(path), recursive=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
