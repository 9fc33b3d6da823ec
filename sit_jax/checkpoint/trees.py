"""Trees of arrays by the names of their leaves, and what differs between two."""

import jax
import numpy as np

from sit_jax.errors import UserError


def named(tree):
    """-> {keys that lead to a leaf, joined by slashes: leaf}."""
    keystr = jax.tree_util.keystr
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def compare(where, found, wanted, most=8):
    """Refuses a tree whose names or shapes are not the wanted ones, listing them."""
    found, wanted = _shapes(found), _shapes(wanted)
    lines = [f"missing {name}" for name in wanted if name not in found]
    lines += [f"extra {name}" for name in found if name not in wanted]
    lines += [
        f"{name} is {found[name]}, not {shape}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    if lines:
        more = f"; and {len(lines) - most} more" if len(lines) > most else ""
        listed = "; ".join(lines[:most])
        raise UserError(f"{where} is of another architecture: {listed}{more}")


def _shapes(tree):
    return {path: tuple(np.shape(leaf)) for path, leaf in named(tree).items()}
