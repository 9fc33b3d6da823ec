"""What a process says of itself when it meets the others, and what must be alike."""

import hashlib
import os
import socket
import sys
from importlib import metadata
from pathlib import Path

from sit_jax.errors import UserError

PACKAGES = (
    *("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    *("flax", "optax", "orbax-checkpoint", "diffrax", "numpy"),
)
SETTINGS = ("JAX_PLATFORMS", "JAX_ENABLE_X64", "XLA_FLAGS", "LIBTPU_INIT_ARGS")
OURS = ("--coordinator", "--processes", "--process")  # may differ between processes


def hello():
    """-> JSON: the host's name and everything that decides what it compiles."""
    versions = {name: _version(name) for name in PACKAGES}
    versions["python"] = ".".join(map(str, sys.version_info[:2]))
    versions["sit_jax"] = _source()
    return {
        "host": socket.gethostname(),
        "versions": {name: found for name, found in versions.items() if found},
        "settings": {name: os.environ.get(name, "") for name in SETTINGS},
        "arguments": arguments(sys.argv[1:]),
    }


def require_alike(hellos):
    """Refuses processes that would compute something else than process 0."""
    for index, other in enumerate(hellos):
        for part in ("versions", "settings", "arguments"):
            if other[part] != hellos[0][part]:
                what = _difference(hellos[0][part], other[part])
                raise UserError(
                    f"process {index} ({other['host']}) is not like process 0 "
                    f"({hellos[0]['host']}): {what}"
                )


def described(hellos):
    """One line: how many, where, of which versions."""
    names = list(dict.fromkeys(each["host"] for each in hellos))
    listed = ", ".join(names[:16]) + (", ..." if len(names) > 16 else "")
    versions = hellos[0]["versions"]
    shown = ", ".join(f"{n} {versions[n]}" for n in ("jax", "jaxlib", "sit_jax"))
    return f"{len(hellos)} processes on {listed}; {shown}"


def arguments(words):
    """Of a command line, without those that say which process it is."""
    kept, is_value = [], False
    for word in words:
        if not is_value and word.partition("=")[0] not in OURS:
            kept.append(word)
        is_value = word in OURS and not is_value
    return kept


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _source():
    """The first digits of a sha256 over the source of script and package."""
    digest = hashlib.sha256()
    for file in (Path(sys.argv[0]), *sorted(Path(__file__).parent.rglob("*.py"))):
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:12]


def _difference(ours, theirs):
    if isinstance(ours, list):
        return f"started with {' '.join(theirs)!r}, not with {' '.join(ours)!r}"
    names = [name for name in ours | theirs if ours.get(name) != theirs.get(name)]
    said = lambda of, name: of.get(name) or "nothing"
    return ", ".join(f"{n} {said(theirs, n)}, not {said(ours, n)}" for n in names)
