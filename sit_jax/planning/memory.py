"""What a training run will hold and compute, reckoned before any of it exists.

Every size follows from shapes and from the rules of sharding, so a plan needs neither
data nor devices: XL/2 on 256 chips is planned on a laptop.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from sit_jax.models.flops import step_macs
from sit_jax.parallel import sharding_rules
from sit_jax.parallel.mesh import num_batch_shards
from sit_jax.planning import programs

NOTABLE = 2**24  # bytes; arrays below are not worth a line where they are held whole


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Sizes of a training run.

    Attributes:
      mesh: the devices, which need not exist.
      model: the network.
      batch_size: images of a step.
      num_parameters: of what is trained.
      items: {name: (bytes in all, bytes on a device)}.
      flops: of a step, on all devices together.
      unsplit: lines about large weights that no device shares with another.
      ragged: lines about weights that a TPU cannot gather.
    """

    mesh: Any
    model: Any
    batch_size: int
    num_parameters: int
    items: dict[str, tuple[int, int]]
    flops: float
    unsplit: tuple[str, ...]
    ragged: tuple[str, ...]

    @property
    def device_bytes(self) -> int:
        """Bytes on one device, without what layers need."""
        return sum(device for _, device in self.items.values())


def plan_memory(config: Any, experiment: Any, mesh: Any) -> MemoryPlan:
    """Returns the plan of a training run.

    Args:
      config, experiment: of programs.build_training_experiment().
      mesh: of devices, or mesh_lib.abstract_mesh's of devices that need not exist.
    """
    shapes, shardings = programs.eval_state_shapes(experiment, mesh)
    sizes = lambda x, s: (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(x)),
        count_device_bytes(x, s),
    )
    batch = config.batch_size * 4 * (math.prod(experiment.shape) + 1)  # of latents
    items = {
        "frozen base": sizes(shapes.frozen_params, shardings.frozen_params),
        "parameters": sizes(shapes.params, shardings.params),
        "gradients": sizes(
            shapes.params, sharding_rules.zero1_shardings(mesh, shapes.params)
        ),
        "optimizer": sizes(shapes.opt_state, shardings.opt_state),
        "EMA": sizes(shapes.ema, shardings.ema),
        "batch": (batch, batch // num_batch_shards(mesh)),
    }
    if not experiment.adapter:
        del items["frozen base"]
    macs = step_macs(experiment.model, experiment.shape)
    return MemoryPlan(
        mesh=mesh,
        model=experiment.model,
        batch_size=config.batch_size,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes.params)),
        items=items,
        flops=6.0 * macs * config.batch_size,
        unsplit=tuple(describe_unsplit(mesh, shapes.params)),
        ragged=tuple(describe_ragged(mesh, shapes.params)),
    )


def count_device_bytes(shapes: Any, shardings: Any) -> int:
    """Returns the bytes that each device holds of a tree of shapes."""
    size = lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(jax.tree.leaves(jax.tree.map(size, shapes, shardings)))


def find_better_mesh(
    weights: list[tuple[str, tuple[int, ...]]], count: int
) -> tuple[int, int] | None:
    """Returns (data, fsdp) of `count` devices that splits all weights, or None.

    Pieces are whole tiles of a TPU, and fsdp is as large as can be.
    """
    for data in (n for n in range(1, count + 1) if count % n == 0):
        sizes = {"data": data, "fsdp": count // data, "tensor": 1}
        places = [
            sharding_rules.choose_spec(*w, sizes, ("fsdp", "data")) for w in weights
        ]
        is_ragged = any(sharding_rules.partial_tile_rows(*w, sizes) for w in weights)
        if not is_ragged and not any(place.missing for place in places):
            return data, count // data
    return None


def describe_unsplit(mesh: Any, params: Any) -> Iterator[str]:
    """Yields lines about large weights that a mesh does not split, and the remedy."""
    large = [
        w for w in sharding_rules.unsharded_arrays(mesh, params) if _is_large(w[1])
    ]
    if not large:
        return
    axes = " and ".join(sorted({axis for *_, missing in large for axis in missing}))
    weights = [(name, shape) for name, shape, _ in large]
    size = 4 * sum(math.prod(shape) for _, shape in weights)
    yield (
        f"NOT SPLIT over {axes}, whose size divides none of their dimensions: "
        f"{_join_names(weights)} ({size / 1e9:.2f} GB of weights, and as much of each "
        "moment and average)"
    )
    if better := find_better_mesh(weights, mesh.size):
        yield f"  {_mesh_flags(*better)} splits all of it"


def describe_ragged(mesh: Any, params: Any) -> Iterator[str]:
    """Yields a line about weights that a TPU cannot gather, and the remedy."""
    large = [w for w in sharding_rules.array_shapes(params) if _is_large(w[1])]
    row_counts = {w: sharding_rules.partial_tile_rows(*w, mesh.shape) for w in large}
    ragged = [w for w in large if row_counts[w]]
    if not ragged:
        return
    better = find_better_mesh(large, mesh.size)
    remedy = f"; {_mesh_flags(*better)} leaves whole tiles" if better else ""
    yield (
        f"ADDED UP instead of gathered: fsdp {mesh.shape['fsdp']} leaves "
        f"{row_counts[ragged[0]]} rows, no whole tiles of {sharding_rules.TILE}, of "
        f"{_join_names(ragged)}, so a TPU sends about twice their size{remedy}"
    )


def _is_large(shape):
    return 4 * math.prod(shape) >= NOTABLE


def _join_names(weights):
    return ", ".join(name for name, _ in weights[:6])


def _mesh_flags(data, fsdp):
    return f"--config.mesh.data={data} --config.mesh.fsdp={fsdp}"
