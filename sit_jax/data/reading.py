"""Records of a source as the rows of a batch: checked, mirrored, stacked.

Numpy alone, so that a process which only reads need not import JAX.
"""

import numpy as np

from sit_jax.data.images import BrokenImage
from sit_jax.data.sources import KINDS
from sit_jax.errors import UserError, one_line


def read(source, ids, mirrors):
    """-> {name: array [len(ids), ..]}, {id: why} of the images that are broken.

    mirrors: bool, for each id. The place of a broken image is taken by the next record
    that is whole: which one follows from the source alone.
    """
    rows, broken = _Rows(len(ids)), {}
    for row, (i, mirror) in enumerate(zip(ids, mirrors, strict=True)):
        rows.put(row, _whole(source, int(i), mirror, broken))
    return rows.arrays, broken


def read_with_gaps(source, ids, mirrors):
    """As read, but the place of a broken image is zeros with the label -1."""
    rows, broken = _Rows(len(ids)), {}
    gap = {"image": np.zeros(source.shape, np.uint8), "label": np.int32(-1)}
    for row, (i, mirror) in enumerate(zip(ids, mirrors, strict=True)):
        try:
            rows.put(row, record(source, int(i), mirror))
        except BrokenImage as error:
            broken[int(i)] = str(error)
            rows.put(row, gap)
    return rows.arrays, broken


class _Rows:
    """Arrays that records are copied into, one by one.

    Faster than to stack them: a record's memory serves for the next one again.
    """

    def __init__(self, length):
        self._length, self.arrays = length, {}

    def put(self, row, found):
        if not self.arrays:
            for name, value in found.items():
                self.arrays[name] = np.empty((self._length, *value.shape), value.dtype)
        if found.keys() != self.arrays.keys():
            raise UserError("the data source mixes records of different kinds")
        for name, value in found.items():
            self.arrays[name][row] = value


def _whole(source, i, mirror, broken):
    """Record i, or if it is broken the first whole one after it."""
    for _ in range(len(source)):
        if i not in broken:
            try:
                return record(source, i, mirror)
            except BrokenImage as error:
                broken[i] = str(error)
        i = (i + 1) % len(source)
    raise UserError(f"all {len(source)} images are broken; the last: {broken[i]}")


def record(source, i, mirror=False):
    """Record i with its dtypes, once its label and shape are right."""
    found = source.mirrored(i) if mirror else source[i]
    kinds = [kind for kind in KINDS if kind in found]
    if len(kinds) != 1 or "label" not in found:
        raise UserError(
            f"record {i} of the data source has {sorted(found)}; "
            f"it needs label and one of {', '.join(KINDS)}"
        )
    kind = kinds[0]
    array, label = np.asarray(found[kind]), int(found["label"])
    if array.shape != tuple(source.shape) or array.dtype != KINDS[kind]:
        raise UserError(
            f"{kind} {i} of the data source is {array.dtype} {list(array.shape)} "
            f"instead of {np.dtype(KINDS[kind])} {list(source.shape)}"
        )
    if not 0 <= label < source.classes:
        raise UserError(
            f"record {i} of the data source has label {label}, but there are "
            f"{source.classes} classes (0..{source.classes - 1})"
        )
    return {kind: array, "label": np.int32(label)}


class Broken:
    """Counts the images that could not be decoded, and names each of them once."""

    def __init__(self, source, say):
        self._found, self._length, self._say = {}, len(source), say
        self._share = getattr(source, "broken_share", 0.0)

    def __len__(self):
        return len(self._found)

    def add(self, found, instead="another image takes its place"):
        """found: {id: why}. Too many of them are a UserError."""
        for i, why in found.items():
            if i not in self._found:
                self._found[i] = why
                self._say(one_line(f"broken image: {why}; {instead}"))
        if len(self._found) > self._share * self._length:
            raise UserError(
                f"{len(self._found)} of {self._length} images are broken, more than "
                f"broken_share={self._share:g} allows; remove them, or allow a larger "
                f"share (--broken-share, --config.source.broken_share); the last: {why}"
            )
