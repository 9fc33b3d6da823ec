"""The mesh of devices, and how batches are split over it.

Three axes. A batch is split over `data` and `fsdp`; weights over `fsdp`, and over
`tensor` the heads and hidden units that a device computes; optimizer, averages and
gradients over `data` as well (placement.py). Sizes alone say which kind of parallelism
that is; data_parallel() and its neighbours name the usual ones.

Axis types are Auto: diffrax's loops fail on the Explicit ones that are JAX's default.
"""

import functools
import math

import jax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from sit_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
HEADS = "tensor"  # the axis that attention heads and hidden units are split over
GROUP = 16  # most devices of `fsdp` in groups(): 1,152 rows are 16 times 9 tiles of 8
_AUTO = (jax.sharding.AxisType.Auto,) * len(AXES)


def data_parallel():
    """Sizes of a mesh: weights on every device, optimizer and averages split (ZeRO-1).

    Rajbhandari et al., arXiv:1910.02054.
    """
    return {"data": -1, "fsdp": 1, "tensor": 1}


def fully_sharded():
    """Nothing is held twice; a layer's weights are gathered when they are needed."""
    return {"data": 1, "fsdp": -1, "tensor": 1}


def groups():
    """fully_sharded inside groups of at most GROUP devices, data parallel between them.

    A TPU gathers weights in tiles of 8 rows, so more and smaller pieces cost it more to
    send than they save in memory (docs/tpu.md).
    """
    return {"data": -1, "fsdp": -1, "tensor": 1}


def with_tensor(size):
    """fully_sharded, and `size` devices share each image's heads and hidden units."""
    return {"data": 1, "fsdp": -1, "tensor": size}


def hybrid(slices):
    """fully_sharded inside each of so many slices, data parallel between them."""
    return {"data": slices, "fsdp": -1, "tensor": 1}


def make_mesh(data=1, fsdp=-1, tensor=1, devices=None):
    """-> Mesh of all devices (or those given); one size may be -1, for the rest.

    If both data and fsdp are, fsdp is the largest up to GROUP that divides a slice.
    """
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(device, "slice_index", None) for device in devices})
    sizes = _sizes(data, fsdp, tensor, len(devices), slices)
    return jax.sharding.Mesh(_arranged(sizes, slices, devices), AXES, _AUTO)


def planned_mesh(count, data=1, fsdp=-1, tensor=1):
    """The mesh of `count` devices that need not exist; nothing can be put there."""
    return AbstractMesh(_sizes(data, fsdp, tensor, count), AXES, _AUTO)


def split_batch(mesh):
    """Sharding of arrays with a leading batch axis."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def everywhere(mesh):
    """Sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def put(tree, where):
    """Arrays that every host holds alike -> the same arrays, placed as `where` says.

    where: a device or sharding (None: the usual device), or one for each array. To
    devices of other hosts, device_put would first compare all values between hosts.
    """
    places = jax.tree.leaves(where)
    if all(getattr(place, "is_fully_addressable", True) for place in places):
        return jax.device_put(tree, where)
    return jax.jit(lambda tree: tree, out_shardings=where)(tree)


def shaped(tree, shardings):
    """Shapes with shardings, from eval_shape's tree: a target to restore into."""
    describe = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    return jax.tree.map(describe, tree, shardings)


def rows(mesh):
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


def on(mesh, fn):
    """fn, in which by_rows() knows the mesh; for use inside jit."""
    mesh = getattr(mesh, "abstract_mesh", mesh)

    @functools.wraps(fn)
    def run(*args, **kwargs):
        with jax.sharding.use_abstract_mesh(mesh):
            return fn(*args, **kwargs)

    return run


def by_rows(x, *axes):
    """x [B, ...], stated to be split over BATCH, and its other axes over `axes`.

    Without this the compiler may split what passes between layers by features, as the
    weights are, and send whole batches around.
    """
    return _stated(x, BATCH, *axes)


def by_heads(x):
    """x [heads, B, ...], stated to be split over HEADS and BATCH."""
    return _stated(x, HEADS, BATCH)


def gathered(weight, *axes):
    """A layer's weight, stated to be split over `axes` only while it is multiplied.

    Without this the compiler may leave it in its pieces, send those round in a ring and
    add up a batch's products with each of them, 72 rows at a time and rounded to the
    weight's type (docs/tpu.md).
    """
    return _stated(weight, *axes)


def _stated(x, *axes):
    """x with a constraint; none outside `on`, or where a dimension does not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(mode != _AUTO[0] for mode in mesh.axis_types):
        return x
    spec = [*axes, *[None] * (x.ndim - len(axes))]
    for i, names in enumerate(spec):
        names = (names,) if isinstance(names, str) else names or ()
        if x.shape[i] % math.prod(mesh.shape[name] for name in names):
            spec[i] = None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _sizes(data, fsdp, tensor, count, slices=1):
    sizes = [data, fsdp, tensor]
    if data == fsdp == -1 and tensor > 0:
        inside = count // slices
        fit = (n for n in range(1, GROUP + 1) if inside % (n * tensor) == 0)
        sizes[1] = max(fit, default=1)
    if sizes.count(-1) == 1:
        known = -math.prod(sizes)
        sizes[sizes.index(-1)] = count // known if known > 0 else 0
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise UserError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} does not make up "
            f"{count} devices; set data, fsdp or tensor to -1 for the rest"
        )
    return tuple(sizes)


def _arranged(sizes, slices, devices):
    """Devices in the order that suits their wires; only `data` leaves a slice.

    Axes of the slice may be shared: 2 x 128 of 16 x 16 chips.
    """
    from jax.experimental import mesh_utils

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
