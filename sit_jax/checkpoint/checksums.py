"""SHA-256 checksums of a step's files.

Orbax restores a flipped bit without an error (75 of 75 tries), so each step carries a
file SHA256SUMS in the format of coreutils: `sha256sum -c SHA256SUMS` inside the step
checks the same. It is written before the step gets its name, and compared before any of
its items is used.
"""

import functools
import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from sit_jax.files import file_version, list_files, sha256

FILE_NAME = "SHA256SUMS"


def write_checksums(step: epath.Path) -> None:
    """Writes the checksums of a step folder whose items are complete."""
    digests = _digests(step, _item_files(step))
    lines = [f"{digest}  {name}\n" for name, digest in digests.items()]
    (step / FILE_NAME).write_text("".join(lines))


def has_checksums(step: epath.Path) -> bool:
    """Returns whether a step says what its files were."""
    return (step / FILE_NAME).exists()


def step_digest(step: epath.Path) -> str | None:
    """Returns 12 hex digits that identify a step, or None if it has no checksums."""
    if not has_checksums(step):
        return None
    return hashlib.sha256((step / FILE_NAME).read_bytes()).hexdigest()[:12]


def damages(step: epath.Path, items: set[str] | None = None) -> list[str]:
    """Lists what is wrong with a step's files, in one sentence each.

    Args:
      step: the step's folder.
      items: names of the items to look at; None means all.

    Returns:
      Sentences; none if all is well, or if the step has no checksums to compare with.
    """
    if not has_checksums(step):
        return []
    wanted: dict[str, str] = {}
    problems = []
    text = (step / FILE_NAME).read_bytes().decode(errors="replace")
    for number, line in enumerate(text.splitlines(keepends=True), 1):
        if match := re.fullmatch(r"([0-9a-f]{64})  (\S.*)\n", line):
            wanted[match[2]] = match[1]
        else:
            problems.append(f"line {number} of {FILE_NAME} is no checksum")
    is_asked = lambda name: items is None or name.split("/")[0] in items
    present = {name for name in _item_files(step) if is_asked(name)}
    listed = {name for name in wanted if is_asked(name)}
    problems += [f"{name} is missing" for name in sorted(listed - present)]
    problems += [f"{name} has no checksum" for name in sorted(present - listed)]
    for name, digest in _digests(step, sorted(present & listed)).items():
        if digest != wanted[name]:
            problems.append(f"{name} differs from its checksum")
    return problems


def _item_files(step: epath.Path) -> list[str]:
    """Returns the names of all files of a step's items, without hidden ones."""
    names = (name for name in list_files(step) if "/" in name)
    return [name for name in names if not name.split("/")[-1].startswith(".")]


def _digests(step: epath.Path, names: Iterable[str]) -> dict[str, str]:
    paths = {name: step / name for name in names}
    with ThreadPoolExecutor(4) as pool:  # hashing releases Python's lock
        digests = pool.map(
            _digest_once, paths.values(), map(file_version, paths.values())
        )
        return dict(zip(paths, digests, strict=True))


@functools.lru_cache(2**14)  # loading one item after the other reads each file once
def _digest_once(path: epath.Path, version: tuple[int, Any]) -> str:
    return sha256(path)
