"""Whether devices that should hold the same values do.

What several devices hold whole, or the same part of, is computed by each for itself. A
memory or link at fault changes it on one of them, which nothing else would notice: the
loss stays plausible. So each device sums up what it holds, and the sums are compared.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from sit_jax.checkpoint import leaves_by_name
from sit_jax.errors import UserError


class Replicas:
    """Compares the copies in a state, every so many steps; 0 is never.

    Only where there are copies: one device has none, and with fsdp alone only small
    arrays do.
    """

    def __init__(self, every, state):
        if every < 0:
            raise UserError(f"check_replicas is {every}; 0 is never, else at least 1")
        mesh = state.step.sharding.mesh
        copied = any(_copied(leaf) for leaf in jax.tree.leaves(state))
        self._every = every if copied else 0
        self._sums = device_sums(mesh, state) if self._every else None

    def compile(self, state):
        """Or the first check does, which may be that of a save after Ctrl-C."""
        if self._every:
            self._sums = self._sums.lower(state).compile()

    def due(self, step):
        return self._every > 0 and step % self._every == 0

    def check(self, step, state):
        """Refuses to go on from a state of which a device holds something else."""
        if self._every and (odd := differing(self._sums(state), state)):
            more = f", and {len(odd) - 1} more arrays" if len(odd) > 1 else ""
            raise UserError(f"step {step}: {odd[0]}{more}")


def device_sums(mesh, state):
    """-> sums(state) -> uint32 [devices in the mesh's order, leaves of the state].

    Each device reads what it holds once; only the sums travel.
    """
    axes = mesh.axis_names
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state)

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=PartitionSpec(),
        check_vma=False,  # that the copies are equal is what is asked
    )
    def sums(state):
        mine = jnp.stack([_sum(leaf) for leaf in jax.tree.leaves(state)])
        return jax.lax.all_gather(mine, axes)

    return sums


def differing(sums, state):
    """A sentence for each array of which some device holds another copy than others."""
    odd = []
    for column, (name, leaf) in zip(
        np.asarray(sums).T, leaves_by_name(state).items(), strict=True
    ):
        found = dict(zip(leaf.sharding.mesh.devices.flat, column.tolist(), strict=True))
        for devices in _same_part(leaf):
            if said := _minority({device: found[device] for device in devices}):
                odd.append(f"{said} of {name}")
    return odd


def _sum(leaf):
    """uint32 []: changes with any bit, each place having an odd weight of its own."""
    if leaf.dtype == bool:
        leaf = leaf.astype(np.uint8)
    bits = jax.lax.bitcast_convert_type(
        leaf, np.dtype(f"uint{8 * leaf.dtype.itemsize}")
    )
    bits = bits.astype(np.uint32).reshape(-1)
    weights = 2 * jax.lax.iota(np.uint32, bits.size) * np.uint32(2654435761) + 1
    return jnp.sum(bits * weights, dtype=np.uint32)


def _same_part(leaf):
    """-> lists of the devices that hold the same part of an array."""
    parts = {}
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        parts.setdefault(str(index), []).append(device)
    return list(parts.values())


def _copied(leaf):
    return len(_same_part(leaf)) < len(leaf.sharding.device_set)


def _minority(found):
    """found: {device: sum} -> who differs from most others; None if nobody does."""
    counts = {}
    for value in found.values():
        counts[value] = counts.get(value, 0) + 1
    if len(counts) == 1:
        return None
    most = max(counts.values())
    if list(counts.values()).count(most) > 1:
        return f"devices {_names(found)} hold different copies"
    usual = max(counts, key=counts.get)
    few = [device for device, value in found.items() if value != usual]
    return (
        f"{_names(few)} holds another copy than {len(found) - len(few)} other devices"
    )


def _names(devices):
    return ", ".join(f"{d} (process {d.process_index})" for d in devices)
