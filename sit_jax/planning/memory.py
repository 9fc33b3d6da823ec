"""What a training run will hold and compute, reckoned before any of it exists.

Every size follows from shapes and from the rules of sharding, so a plan needs neither
data nor devices: XL/2 on 256 chips is planned on a laptop.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from sit_jax.experiment import Experiment
from sit_jax.models.flops import step_macs
from sit_jax.parallel import hardware, sharding_rules
from sit_jax.parallel.mesh import num_batch_shards
from sit_jax.planning import programs

NOTABLE = 2**24  # bytes; arrays below are not worth a line where they are held whole


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Sizes of a training run.

    Attributes:
      title: the network and the devices, which need not exist.
      mesh: the devices.
      batch_size: images of a step.
      num_parameters: of what is trained.
      items: {name: (bytes in all, bytes on a device)}.
      flops: of a step, on all devices together.
      unsplit: lines about large weights that no device shares with another.
      ragged: lines about weights that a TPU cannot gather.
    """

    title: str
    mesh: Any
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

    def describe(self, mfu: float, kind: str, available: float | None) -> Iterator[str]:
        """Yields the plan in lines.

        Args:
          mfu: the share of a device's peak that a step's time is reckoned with.
          kind: the device_kind of the devices.
          available: bytes of a device, where known.
        """
        yield self.title
        yield f"{'GB':24} {'in all':>9} {'a device':>9}"
        total = (sum(whole for whole, _ in self.items.values()), self.device_bytes)
        for name, sizes in (self.items | {"total": total}).items():
            yield f"{name:24} {sizes[0] / 1e9:9.2f} {sizes[1] / 1e9:9.3f}"
        if available:
            free = available - self.device_bytes
            words = f"{free / 1e9:.1f} GB free" if free > 0 else "DOES NOT FIT"
            yield (
                f"a device has {available / 1e9:.1f} GB: {words}, before activations "
                "and what else layers need"
            )
        yield from self.unsplit
        yield from self.ragged if "TPU" in kind else ()
        yield (
            f"{self.flops / 1e12:.4g} TFLOP a step, "
            f"{self.flops / self.batch_size / 1e9:.4g} GFLOP an image"
        )
        if peak := hardware.chip_of(kind).peak_flops:
            seconds = self.flops / (self.mesh.size * peak * mfu)
            yield (
                f"at {mfu:.0%} of {peak / 1e12:g} TFLOP/s: {seconds:.4g} s a step, "
                f"{self.batch_size / seconds:,.0f} images/s"
            )


def plan_memory(config: Any, experiment: Experiment, mesh: Any) -> MemoryPlan:
    """Returns the plan of a training run.

    Args:
      config, experiment: of programs.build_training_experiment().
      mesh: of devices, or mesh.abstract_mesh's of devices that need not exist.
    """
    shapes, shardings = programs.eval_state_shapes(experiment, mesh)
    gradients = sharding_rules.zero1_shardings(mesh, shapes.params)
    trees = {
        "frozen base": (shapes.frozen_params, shardings.frozen_params),
        "parameters": (shapes.params, shardings.params),
        "gradients": (shapes.params, gradients),
        "optimizer": (shapes.opt_state, shardings.opt_state),
        "EMA": (shapes.ema, shardings.ema),
    }
    items = {
        name: (
            sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)),
            count_device_bytes(tree, where),
        )
        for name, (tree, where) in trees.items()
        if name != "frozen base" or experiment.adapter
    }
    batch = config.batch_size * 4 * (math.prod(experiment.shape) + 1)  # of latents
    items["batch"] = (batch, batch // num_batch_shards(mesh))
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes.params))
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    title = (
        f"{type(experiment.model).__name__}, {count:,} parameters, on {mesh.size} "
        f"devices ({axes}), batch {config.batch_size}"
    )
    return MemoryPlan(
        title=title,
        mesh=mesh,
        batch_size=config.batch_size,
        num_parameters=count,
        items=items,
        flops=6.0 * step_macs(experiment.model, experiment.shape) * config.batch_size,
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
        axes = ("fsdp", "data")
        if not any(
            sharding_rules.partial_tile_rows(*weight, sizes)
            or sharding_rules.choose_spec(*weight, sizes, axes).missing
            for weight in weights
        ):
            return data, count // data
    return None


def describe_unsplit(mesh: Any, params: Any) -> Iterator[str]:
    """Yields lines about large weights that a mesh does not split, and the remedy."""
    unsplit = {
        (name, shape): axes
        for name, shape, axes in sharding_rules.unsharded_arrays(mesh, params)
        if _is_large(shape)
    }
    if not unsplit:
        return
    axes = " and ".join(sorted(set().union(*unsplit.values())))
    size = 4 * sum(math.prod(shape) for _, shape in unsplit)
    remedy = _remedy(mesh, list(unsplit), "splits all of it")
    yield (
        f"NOT SPLIT over {axes}, whose size divides none of their dimensions: "
        f"{_join_names(unsplit)} ({size / 1e9:.2f} GB of weights, and as much of each "
        f"moment and average){remedy}"
    )


def describe_ragged(mesh: Any, params: Any) -> Iterator[str]:
    """Yields a line about weights that a TPU cannot gather, and the remedy."""
    large = [w for w in sharding_rules.array_shapes(params) if _is_large(w[1])]
    rows = {w: sharding_rules.partial_tile_rows(*w, mesh.shape) for w in large}
    if ragged := [w for w in large if rows[w]]:
        yield (
            f"ADDED UP instead of gathered: fsdp {mesh.shape['fsdp']} leaves "
            f"{rows[ragged[0]]} rows, no whole tiles of {sharding_rules.TILE}, of "
            f"{_join_names(ragged)}, so a TPU sends about twice their size"
            f"{_remedy(mesh, large, 'leaves whole tiles')}"
        )


def _remedy(mesh: Any, weights: list[tuple[str, tuple[int, ...]]], words: str) -> str:
    if better := find_better_mesh(weights, mesh.size):
        data, fsdp = better
        return f"; --config.mesh.data={data} --config.mesh.fsdp={fsdp} {words}"
    return ""


def _is_large(shape: tuple[int, ...]) -> bool:
    return 4 * math.prod(shape) >= NOTABLE


def _join_names(weights: Iterable[tuple[str, tuple[int, ...]]]) -> str:
    return ", ".join(name for name, _ in list(weights)[:6])
