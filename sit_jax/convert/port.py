"""Moves weights between PyTorch state dicts and Flax trees, by one table of rules.

A rule is (torch name, flax name, layout). The layout is an einsum that only reorders
axes, so reading it backwards is the opposite conversion. A `*` in the torch name
stands for the layer number; those layers are stacked along the flax array's axis 0.
Rules that share what comes before the `*` are one run of layers; runs and other rules
stand in a table in the order that torch's state_dict has.
"""

import itertools
import re

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sit_jax.errors import UserError


def to_flax(rules, state, consume=False):
    """-> params (numpy), and the set of names in state that no rule mentions.

    state is any mapping from names to arrays or CPU tensors. One entry is read at a
    time; with `consume` it also leaves state, so both are never held whole.
    """
    named = layer_names(rules, state)
    missing = [n for names in named for n in names if n not in state]
    if missing:
        raise UserError(f"weights lack {listed(missing)}: another architecture?")
    take = state.pop if consume else state.__getitem__
    wrong, flat = [], {}
    for (torch_name, flax_name, layout), names in zip(rules, named, strict=True):
        stacked = "*" in torch_name
        flat[flax_name] = _gather(names, take, layout, stacked, wrong)
    if wrong:
        raise UserError(f"weights have unusable entries: {listed(wrong)}")
    return unflatten_dict(flat, sep="/"), set(state) - set(itertools.chain(*named))


def to_torch(rules, params, consume=False):
    """-> state dict of contiguous numpy arrays, in the order of torch's own.

    With `consume` the leaves leave params one by one, so both are never held whole.
    """
    state = dict.fromkeys(_ordered(rules, _depths(rules, params)))
    for torch_name, flax_name, layout in rules:
        there, here = layout.split("->")
        array = np.asarray(_leaf(params, flax_name, consume))
        for i, layer in enumerate(array if "*" in torch_name else [array]):
            layer = np.einsum(f"{here}->{there}", layer)
            state[torch_name.replace("*", str(i))] = np.array(layer, order="C")
    return state


def require_match(expected, params):
    """Refuses params whose names or shapes are not those of expected (any leaves)."""
    want, have = (flatten_dict(tree, sep="/") for tree in (expected, params))
    faults = {
        "missing": sorted(want.keys() - have.keys()),
        "extra": sorted(have.keys() - want.keys()),
        "misshapen": [
            f"{name} {tuple(have[name].shape)} instead of {tuple(want[name].shape)}"
            for name in sorted(want.keys() & have.keys())
            if tuple(have[name].shape) != tuple(want[name].shape)
        ],
    }
    parts = [f"{fault}: {listed(names)}" for fault, names in faults.items() if names]
    if parts:
        raise UserError(f"weights are of another architecture; {'; '.join(parts)}")


def layer_names(rules, state):
    """-> for each rule the torch names it stands for; a gap in the layers is named."""
    depths = {}
    for torch_name, _, _ in rules:
        pattern = re.compile(re.escape(torch_name).replace(r"\*", r"(\d+)"))
        for match in filter(None, map(pattern.fullmatch, state)):
            if match.groups():
                prefix = _prefix(torch_name)
                depths[prefix] = max(depths.get(prefix, 0), int(match[1]) + 1)
    return [_names(name, depths.get(_prefix(name), 1)) for name, _, _ in rules]


def listed(names, most=8):
    """Names in one line, the surplus counted."""
    shown = ", ".join(names[:most])
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _gather(names, take, layout, stacked, wrong):
    """One flax leaf, filled in place; faults are described in the list `wrong`."""
    leaf, rank = None, layout.index("->")
    for i, name in enumerate(names):
        array = np.asarray(take(name))
        if array.ndim != rank:
            wrong.append(f"{name} {array.shape} has not {rank} axes")
            continue
        array = np.einsum(layout, array)
        if leaf is None:
            like, first = (array.shape, array.dtype), name
            lead = (len(names),) if stacked else ()
            leaf = np.empty(lead + array.shape, array.dtype)
        if (array.shape, array.dtype) != like:
            wrong.append(f"{name} {array.dtype}{array.shape} is not like {first}")
            continue
        leaf[i if stacked else ...] = array
    return leaf


def _depths(rules, params):
    """-> number of layers by prefix; params must be exactly what the rules name."""
    flat = flatten_dict(params, sep="/")
    named = {flax_name for _, flax_name, _ in rules}
    if odd := sorted(named ^ flat.keys()):
        raise UserError(f"weights and rules do not share {listed(odd)}")
    depths = {}
    for torch_name, flax_name, _ in rules:
        depth, prefix = len(flat[flax_name]), _prefix(torch_name)
        if prefix is not None and depths.setdefault(prefix, depth) != depth:
            raise UserError(f"{flax_name} has {depth} layers, not {depths[prefix]}")
    return depths


def _ordered(rules, depths):
    """Torch names with the layers of one run interleaved: all of 0, all of 1, ..."""
    for prefix, run in itertools.groupby(rules, lambda rule: _prefix(rule[0])):
        names = [torch_name for torch_name, _, _ in run]
        for i in range(depths.get(prefix, 1)):
            yield from (name.replace("*", str(i)) for name in names)


def _prefix(torch_name):
    before, star, _ = torch_name.partition("*")
    return before if star else None


def _names(torch_name, depth):
    if "*" not in torch_name:
        return [torch_name]
    return [torch_name.replace("*", str(i)) for i in range(depth)]


def _leaf(params, path, remove=False):
    *folders, last = path.split("/")
    for folder in folders:
        params = params[folder]
    return params.pop(last) if remove else params[last]
