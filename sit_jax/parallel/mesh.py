"""The mesh of devices, and how batches are split over it.

Three axes. A batch is split over `data` and `fsdp`; weights over `fsdp`, and over
`tensor` the heads and hidden units that a device computes; optimizer, EMA and gradients
over `data` as well (sharding_rules.py). Sizes alone say which kind of parallelism that
is; data_parallel() and its neighbours name the usual ones.

Axis types are Auto: diffrax's loops fail on the Explicit ones that are JAX's default.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sit_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
HEADS = "tensor"  # the axis that attention heads and hidden units are split over
GROUP = 16  # most devices of `fsdp` in fsdp_groups(): 1,152 rows are 16 x 9 tiles of 8
_AUTO = (jax.sharding.AxisType.Auto,) * len(AXES)


def data_parallel() -> dict[str, int]:
    """Returns sizes: weights on every device, optimizer and EMA split.

    Source: ZeRO-1, Rajbhandari et al., arXiv:1910.02054.
    """
    return {"data": -1, "fsdp": 1, "tensor": 1}


def fully_sharded() -> dict[str, int]:
    """Returns sizes: nothing is held twice; a layer's weights are gathered to run."""
    return {"data": 1, "fsdp": -1, "tensor": 1}


def fsdp_groups() -> dict[str, int]:
    """Returns sizes: fully sharded in groups of at most GROUP, data parallel between.

    A TPU gathers weights in tiles of 8 rows, so more and smaller pieces cost it more to
    send than they save in memory (docs/evidence/tpu.md).
    """
    return {"data": -1, "fsdp": -1, "tensor": 1}


def tensor_parallel(size: int) -> dict[str, int]:
    """Returns sizes: fully sharded; `size` devices share each image's heads."""
    return {"data": 1, "fsdp": -1, "tensor": size}


def hybrid_parallel(slices: int) -> dict[str, int]:
    """Returns sizes: fully sharded inside each slice, data parallel between slices."""
    return {"data": slices, "fsdp": -1, "tensor": 1}


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Returns the mesh of all devices, or of those given.

    One size may be -1, for the rest. If both data and fsdp are, fsdp is the largest
    number up to GROUP that divides a slice.

    Raises:
        UserError: the sizes do not make up the devices.
    """
    devices = jax.devices() if devices is None else devices
    # only TPUs of several slices have an index
    slices = len({getattr(device, "slice_index", None) for device in devices})
    sizes = _resolve_sizes(data, fsdp, tensor, len(devices), slices)
    return Mesh(_arrange_devices(sizes, slices, devices), AXES, _AUTO)


def abstract_mesh(
    count: int, data: int = 1, fsdp: int = -1, tensor: int = 1
) -> AbstractMesh:
    """Returns the mesh of `count` devices that need not exist."""
    return AbstractMesh(_resolve_sizes(data, fsdp, tensor, count), AXES, _AUTO)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays with a leading batch axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def num_batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def device_put_global(tree: Any, shardings: Any) -> Any:
    """Returns arrays that every process holds alike, placed as `shardings` says.

    To devices of other processes, device_put would first compare all values.

    Args:
        tree: arrays, the same in all processes.
        shardings: a device or sharding (None: the usual device), or one for each array.
    """
    places = jax.tree.leaves(shardings)
    shardable = [p for p in places if isinstance(p, jax.sharding.Sharding)]
    if all(sharding.is_fully_addressable for sharding in shardable):
        return jax.device_put(tree, shardings)
    return jax.jit(lambda tree: tree, out_shardings=shardings)(tree)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Returns shapes of eval_shape with shardings: a target to restore into."""
    place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(place, shapes, shardings)


def with_mesh(mesh: Mesh | AbstractMesh, fn: Callable) -> Callable:
    """Returns fn, in which shard_batch() knows the mesh; for use inside jit."""
    mesh = mesh.abstract_mesh

    @functools.wraps(fn)
    def run(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh):
            return fn(*args, **kwargs)

    return run


def shard_batch(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains x [b, ...] to be split over BATCH, and its other axes over `axes`.

    Without this the compiler may split what passes between layers by features, as the
    weights are, and send whole batches around.
    """
    return _constrain(x, BATCH, *axes)


def shard_heads(x: jax.Array) -> jax.Array:
    """Constrains x [heads, b, ...] to be split over HEADS and BATCH."""
    return _constrain(x, HEADS, BATCH)


def unshard_weight(weight: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains a layer's weight to be split over `axes` only while it is multiplied.

    Without this the compiler may leave it in its pieces, send those round in a ring and
    add up a batch's products with each of them, 72 rows at a time and rounded to the
    weight's type (docs/evidence/tpu.md).
    """
    return _constrain(weight, *axes)


def _constrain(x, *axes):
    """Constrains x inside with_mesh(), but for dimensions that do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(mode != _AUTO[0] for mode in mesh.axis_types):
        return x
    spec = [*axes, *[None] * (x.ndim - len(axes))]
    for i, names in enumerate(spec):
        names = (names,) if isinstance(names, str) else names or ()
        if x.shape[i] % math.prod(mesh.shape[name] for name in names):
            spec[i] = None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _resolve_sizes(data, fsdp, tensor, count, slices=1):
    sizes = [data, fsdp, tensor]
    if data == fsdp == -1 and tensor > 0:
        inside = count // slices
        fit = (n for n in range(1, GROUP + 1) if inside % (n * tensor) == 0)
        sizes[1] = max(fit, default=1)
    if sizes.count(-1) == 1:
        others = -math.prod(sizes)  # of the two sizes that are given
        sizes[sizes.index(-1)] = count // others if others > 0 else 0
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise UserError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} does not make up "
            f"{count} devices; set data, fsdp or tensor to -1 for the rest"
        )
    return tuple(sizes)


def _arrange_devices(sizes, slices, devices):
    """Returns devices in the order that suits their links; only `data` leaves a slice.

    Axes of the slice may be shared: 2 x 128 of 16 x 16 chips.
    """
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, **split)
    data, *inside = sizes
    if data % slices:
        raise UserError(
            f"mesh.data is {data} on {slices} slices; between slices only `data` is "
            f"split, so make it a multiple of {slices}"
        )
    shape, between = (data // slices, *inside), (slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(shape, between, devices, **split)
