"""Where arrays live: batches split over all devices, large weights split too.

One mesh with the axes `data` and `fsdp`. Batches are split over both, weights over
`fsdp`: fsdp=1 is plain data parallelism, fsdp=-1 (all devices) keeps no copy twice.
Axis types are Auto: diffrax's loops fail on the Explicit ones that are JAX's default.
"""

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sit_jax.errors import UserError

BATCH = ("data", "fsdp")


def make_mesh(data=1, fsdp=-1, devices=None):
    """-> Mesh of all devices (or those given); one size may be -1, for the rest."""
    devices = jax.devices() if devices is None else devices
    sizes, n = [data, fsdp], len(devices)
    if sizes.count(-1) == 1:
        known = -np.prod(sizes)
        sizes[sizes.index(-1)] = n // known if known > 0 else 0
    if min(sizes) < 1 or np.prod(sizes) != n:
        raise UserError(
            f"mesh data={data} x fsdp={fsdp} does not make up {n} devices; "
            "set one of the two to -1 for the rest"
        )
    axis = jax.sharding.AxisType.Auto
    return jax.make_mesh(sizes, BATCH, axis_types=(axis, axis), devices=devices)


def split_batch(mesh):
    """Sharding of arrays with a leading batch axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def everywhere(mesh):
    """Sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_weights(mesh, tree, floor=2**14):
    """Shardings for a tree of weights (arrays or shapes), leaf by leaf.

    The longest axis that divides is split over `fsdp`; leaves of at most `floor`
    elements are copied everywhere. Stacked blocks are never split along the layers,
    so that the scan gathers one layer at a time.
    """

    def place(path, leaf):
        stacked = any("blocks" in str(key) for key in path)
        if leaf.size <= floor or mesh.shape["fsdp"] == 1:
            return everywhere(mesh)
        spec = [None] * leaf.ndim
        for axis in np.argsort(leaf.shape)[::-1]:
            if leaf.shape[axis] % mesh.shape["fsdp"] == 0 and not (
                stacked and axis == 0
            ):
                spec[axis] = "fsdp"
                break
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def put(tree, where):
    """Arrays that every host holds alike -> the same arrays, placed as `where` says."""
    places = jax.tree.leaves(where)  # one for each array, or one for all
    if all(place.is_fully_addressable for place in places):
        return jax.device_put(tree, where)
    return jax.jit(lambda tree: tree, out_shardings=where)(tree)


def shaped(tree, shardings):
    """Shapes with shardings, from eval_shape's tree: a target to restore into."""
    describe = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(describe, tree, shardings)
