"""The sums of a step's files: written before the step appears, compared before its use.

SHA256SUMS stands inside the step and has the lines of coreutils' sha256sum, so that
`sha256sum -c SHA256SUMS` in there does the same. It lists every file of every item. Of
itself it needs no sum: a line that is damaged no longer fits its file, and a line that
is gone leaves a file unlisted. Two files of Orbax beside the items are not listed: they
are completed after the sums are made, and nothing here reads them.
"""

import functools
import hashlib
import re
from concurrent.futures import ThreadPoolExecutor

from sit_jax import places

SUMS = "SHA256SUMS"


def write_sums(step):
    """Adds the sums to a step directory whose items are complete."""
    names = _files(step)
    lines = [f"{digest}  {name}\n" for name, digest in _digests(step, names).items()]
    (step / SUMS).write_text("".join(lines))


def has_sums(step):
    return (step / SUMS).exists()


def identity(step):
    """What tells a step from others without reading it: None if it has no sums."""
    if not has_sums(step):
        return None
    return hashlib.sha256((step / SUMS).read_bytes()).hexdigest()[:12]


def damages(step, items=None):
    """What is wrong with the files of these items (None: all), a sentence for each.

    Nothing is wrong with a step that has no sums. A file that has not changed since it
    was found right is not read again by this process.
    """
    if not has_sums(step):
        return []
    text = (step / SUMS).read_bytes().decode(errors="replace")
    wanted, odd = _parsed(text)
    inside = lambda name: items is None or name.split("/")[0] in items
    found = {name for name in _files(step) if inside(name)}
    listed = {name for name in wanted if inside(name)}
    lines = [f"line {number} of {SUMS} is no sum" for number in odd]
    lines += [f"{name} is missing" for name in sorted(listed - found)]
    lines += [f"{name} has no sum" for name in sorted(found - listed)]
    same = sorted(found & listed)
    for name, digest in _digests(step, same).items():
        if digest != wanted[name]:
            lines.append(f"{name} differs from its sum")
    return lines


def _parsed(text):
    """-> {file: sum}, and the numbers of lines that are none."""
    wanted, odd = {}, []
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if match := re.fullmatch(r"([0-9a-f]{64})  (\S.*)\n", line):
            wanted[match[2]] = match[1]
        else:
            odd.append(number)
    return wanted, odd


def _files(step):
    """Names, relative to the step, of all files of its items; hidden ones left out."""
    names = (name.split("/") for name in places.files(step))
    inside = (name for name in names if len(name) > 1)
    return ["/".join(name) for name in inside if not name[-1].startswith(".")]


def _digests(step, names):
    """-> {name: sha256}; hashing gives up Python's lock, so threads share it."""
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(lambda name: _digest_now(step / name), names)
        return dict(zip(names, digests, strict=True))


def _digest_now(path):
    return _digest(path, places.version(path))


@functools.lru_cache(2**14)
def _digest(path, version):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
