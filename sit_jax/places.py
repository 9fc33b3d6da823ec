"""Paths as users write them."""

import re
from pathlib import Path

from sit_jax.errors import UserError


def local(path):
    """-> Path, ~ replaced; refuses addresses, which would name a folder like "gs:".

    What writes and reads here renames, appends and maps files, and a bucket does none
    of it. Mounted as a folder (gcsfuse) its path is one like any other.
    """
    if match := re.match(r"([a-z][a-z0-9+.-]+)://", str(path)):
        hint = "gcsfuse BUCKET DIR" if match[1] == "gs" else f"{match[1]} storage"
        raise UserError(
            f"{path}: only paths of files are taken; mount it ({hint}) and give the "
            "folder's path"
        )
    return Path(path).expanduser()
