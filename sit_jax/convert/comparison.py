"""Two sides of a conversion held against each other, tensor by tensor."""

import dataclasses
import hashlib

import numpy as np

from sit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Of one part on both sides."""

    tensors: int
    difference: float
    left: str  # sha256 over the tensors' names, shapes and bytes, whatever their order
    right: str


def compare(tensors, parts):
    """(part, name, array)s against {part: state dict} -> {part: Comparison}."""
    hashes = {part: ([], []) for part in parts}
    worst = dict.fromkeys(parts, 0.0)
    for part, name, left in tensors:
        right = parts[part][name]
        for found, array in zip(hashes[part], (left, right), strict=True):
            found.append(f"{name} {array.shape} {array.dtype} {_sha(array)}\n")
        if hashes[part][0][-1] != hashes[part][1][-1]:
            worst[part] = max(worst[part], _difference(left, right))
    return {part: _compared(part, *hashes[part], worst[part], parts) for part in parts}


def _compared(part, left, right, difference, parts):
    if len(left) != len(parts[part]):
        raise UserError(f"{part}: {len(left)} tensors came back of {len(parts[part])}")
    left, right = (
        hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
        for lines in (left, right)
    )
    return Comparison(len(parts[part]), difference, left, right)


def _difference(left, right):
    if left.shape != right.shape:
        return float("inf")
    return float(
        np.nanmax(np.abs(np.subtract(left, right, dtype=np.float64)), initial=0)
    )


def _sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
