"""What a training run will hold and compute, told before any of it exists.

Every size follows from shapes and from the table of sharding_rules.py, so a plan needs
neither data nor devices: XL/2 on 256 chips is planned on a laptop.
"""

import dataclasses
import math

import jax

from sit_jax.models.flops import step_macs
from sit_jax.parallel import sharding_rules
from sit_jax.parallel.mesh import num_batch_shards
from sit_jax.planning import program
from sit_jax.planning.residuals import saved_bytes

NOTABLE = 2**24  # bytes; arrays below are not worth a word where they are held whole


@dataclasses.dataclass(frozen=True)
class Plan:
    mesh: object
    model: object
    batch_size: int
    parameters: int
    items: dict  # {name: (bytes in all, bytes on a device)}
    flops: float  # of a step, on all devices together
    whole: tuple  # lines that say what could not be split
    ragged: tuple  # and what a TPU cannot gather

    @property
    def bytes(self):
        """Of one device."""
        return sum(device for _, device in self.items.values())

    def seconds(self, peak, share):
        """Of a step, if `share` of the devices' peak [FLOP/s] is used."""
        return self.flops / (self.mesh.size * peak * share)


def bytes_of(shapes, shardings):
    """-> bytes that each device holds of a tree of shapes."""
    size = lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(size, shapes, shardings)))


def plan(config, parts, mesh):
    """-> Plan of a training step. mesh: of devices, or sharding.planned_mesh's."""
    shapes, where = program.state_shapes(parts, mesh)
    sizes = lambda x, s: (_total(x), bytes_of(x, s))
    frozen = (
        {"frozen base": sizes(shapes.frozen, where.frozen)} if parts.adapter else {}
    )
    items = frozen | {
        "parameters": sizes(shapes.params, where.params),
        "gradients": sizes(
            shapes.params, sharding_rules.zero1_shardings(mesh, shapes.params)
        ),
        "optimizer": sizes(shapes.opt_state, where.opt_state),
        "averages": sizes(shapes.ema, where.ema),
        "batch": _batch(config, parts, mesh),
        f"activations ({parts.model.remat})": _activations(config, parts, mesh),
    }
    macs = step_macs(parts.model, parts.shape)
    return Plan(
        mesh=mesh,
        model=parts.model,
        batch_size=config.batch_size,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes.params)),
        items=items,
        flops=6.0 * macs * config.batch_size,
        whole=tuple(held_whole(mesh, shapes.params)),
        ragged=tuple(added_up(mesh, shapes.params)),
    )


def lines(made, share, peak=None, memory=None, tpu=False):
    """A Plan in words. share: MFU; peak [FLOP/s] and memory [bytes]: of one device."""
    axes = " x ".join(f"{axis} {size}" for axis, size in made.mesh.shape.items())
    yield (
        f"{type(made.model).__name__}, {made.parameters:,} parameters, on "
        f"{made.mesh.size} devices ({axes}), batch {made.batch_size}"
    )
    yield f"{'GB':24} {'in all':>9} {'a device':>9}"
    total = sum(whole for whole, _ in made.items.values())
    for name, sizes in (*made.items.items(), ("total", (total, made.bytes))):
        yield f"{name:24} {sizes[0] / 1e9:9.2f} {sizes[1] / 1e9:9.3f}"
    if memory:
        room = memory - made.bytes
        told = f"{room / 1e9:.1f} GB free" if room > 0 else "DOES NOT FIT"
        yield f"a device has {memory / 1e9:.1f} GB: {told}, before what layers need"
    yield from made.whole
    yield from made.ragged if tpu else ()
    yield (
        f"{made.flops / 1e12:.4g} TFLOP a step, "
        f"{made.flops / made.batch_size / 1e9:.4g} GFLOP an image"
    )
    if peak:
        seconds = made.seconds(peak, share)
        yield (
            f"at {share:.0%} of {peak / 1e12:g} TFLOP/s: {seconds:.4g} s a step, "
            f"{made.batch_size / seconds:,.0f} images/s"
        )


def better_mesh(tree, count):
    """-> (data, fsdp) of so many devices that splits all of a tree, or None.

    tree: [(name, shape, ...)]. Pieces are whole tiles, and fsdp is as large as can be.
    """
    for data in (n for n in range(1, count + 1) if count % n == 0):
        sizes = {"data": data, "fsdp": count // data, "tensor": 1}
        axes = ("fsdp", "data")
        missing = (
            sharding_rules.choose_spec(n, s, sizes, axes).missing for n, s, *_ in tree
        )
        if not any(missing) and not any(
            sharding_rules.partial_tile_rows(n, s, sizes) for n, s, *_ in tree
        ):
            return data, count // data
    return None


def held_whole(mesh, params):
    """Lines that say which large weights no axis of the mesh divides, and which can."""
    large = [
        each
        for each in sharding_rules.unsharded_arrays(mesh, params)
        if _large(each[1])
    ]
    if not large:
        return
    axes = " and ".join(sorted({axis for *_, missing in large for axis in missing}))
    size = 4 * sum(math.prod(shape) for _, shape, _ in large)
    yield (
        f"NOT SPLIT over {axes}, whose size divides none of their dimensions: "
        f"{_names(large)} ({size / 1e9:.2f} GB of weights, and as much of each moment "
        "and average)"
    )
    if found := better_mesh(large, mesh.size):
        yield f"  {_mesh(*found)} splits all of it"


def added_up(mesh, params):
    """The line that says which large weights a TPU will not gather, and the remedy."""
    large = [each for each in sharding_rules.array_shapes(params) if _large(each[1])]
    rows = {each: sharding_rules.partial_tile_rows(*each, mesh.shape) for each in large}
    cut = [each for each in large if rows[each]]
    if not cut:
        return
    found = better_mesh(large, mesh.size)
    remedy = f"; {_mesh(*found)} leaves whole tiles" if found else ""
    yield (
        f"ADDED UP instead of gathered: fsdp {mesh.shape['fsdp']} leaves "
        f"{rows[cut[0]]} rows, no whole tiles of {sharding_rules.TILE}, of "
        f"{_names(cut)}, so a TPU sends about twice their size{remedy}"
    )


def _large(shape):
    return 4 * math.prod(shape) >= NOTABLE


def _names(found):
    return ", ".join(name for name, *_ in found[:6])


def _mesh(data, fsdp):
    return f"--config.mesh.data={data} --config.mesh.fsdp={fsdp}"


def _batch(config, parts, mesh):
    """Of latents; images would be 12 times as large."""
    size = config.batch_size * 4 * (math.prod(parts.shape) + 1)
    return size, size // num_batch_shards(mesh)


def _activations(config, parts, mesh):
    """Of one of the parts that a batch is gone through in; rows split, no more."""
    images = max(config.batch_size // config.accumulate // num_batch_shards(mesh), 1)
    # the programs of attention that keep most, a TPU's and the others'
    each = max(
        saved_bytes(dataclasses.replace(parts.model, attention=by), parts.shape, images)
        for by in ("xla", "heads_first")
    )
    return each * num_batch_shards(mesh), each


def _total(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
