"""--plan: what a run would hold, compute and send, printed instead of running it."""

import dataclasses
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from typing import Any

import jax

from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment, check_batch
from sit_jax.parallel import hardware
from sit_jax.parallel import mesh as mesh_lib
from sit_jax.planning import memory, programs, tpu_compile
from sit_jax.ranges import COUNT, Above

FLAGS = ("devices", "chip", "mfu", "topology", "once")


def add_flags(parser: ArgumentParser) -> None:
    """Adds the flags of a plan."""
    group = parser.add_argument_group("a plan, for devices that need not exist")
    add = group.add_argument
    add("--plan", action="store_true", help="print it instead of running")
    add("--topology", metavar="v5p:4x4x8", help="compile for this TPU slice (libtpu)")
    add("--once", action="store_true", help="do not look for the largest batch")
    add("--devices", type=COUNT, metavar="N", help="how many; default: those here")
    add("--chip", metavar="NAME", help=", ".join(hardware.CHIPS))
    add("--mfu", type=Above(0.0, 1.0), metavar="X", help="of the peak; else 0.5")


def check_flags(args: Namespace) -> None:
    """Refuses flags of a plan without one, and flags that exclude each other."""
    given = [flag for flag in FLAGS if getattr(args, flag) not in (None, False)]
    if given and not args.plan:
        raise UserError(f"--{given[0]} goes with --plan")
    if args.topology and (args.devices or args.chip):
        raise UserError("--topology says which chips and how many; give it alone")


@dataclasses.dataclass(frozen=True)
class SliceProgram:
    """A program for a TPU slice, to be compiled for batches of any size.

    Attributes:
      topology: the slice.
      device: one of its devices.
      lower: returns the lowered program of a batch.
      batch: the size that is asked for.
      step: what sizes are multiples of.
      flops: of one chip; None where the share of its peak is not wanted.
    """

    topology: str
    device: Any
    lower: Callable[[int], Any]
    batch: int
    step: int
    flops: float | None = None

    def compile(self, batch: int) -> tpu_compile.TPUProgram | None:
        """Returns the program of a batch; None where it does not fit."""
        return tpu_compile.compile_for_tpu(self.lower(batch), self.device)

    def describe(self, once: bool) -> Iterator[str]:
        """Yields lines about it, and unless `once` the largest batch that fits."""
        program, title = (
            self.compile(self.batch),
            f"{self.topology}, batch {self.batch}",
        )
        if program is None:
            yield f"{title}: DOES NOT FIT"
        else:
            yield f"{title}:"
            kind = self.device.device_kind
            yield from tpu_compile.describe_program(program, self.flops, kind)
        if once:
            return
        yield "looking for the largest batch that fits ..."
        most = tpu_compile.find_largest_batch(
            self.compile, self.batch, program, self.step
        )
        yield f"largest batch seen to fit: {most or f'none; less than {self.batch}'}"


def plan_training(
    config: Any,
    *,
    topology: str | None = None,
    devices: int | None = None,
    chip: str | None = None,
    mfu: float | None = None,
    once: bool = False,
) -> Iterator[str]:
    """Yields the lines of a training run's plan, as they are known.

    Args:
      config: the run's.
      topology: a TPU slice to compile for, like v5p:4x4x8.
      devices: how many, without a topology; by default those here.
      chip: their kind, a name of hardware.CHIPS.
      mfu: the share of the peak that a step's time is reckoned with; 0.5 by default.
      once: whether not to look for the largest batch.
    """
    # first, for libtpu is not to look for a TPU here when JAX finds its devices
    tpus = tpu_compile.get_tpu_devices(topology) if topology else None
    experiment = programs.build_training_experiment(config)
    if tpus:
        mesh = mesh_lib.make_mesh(**config.mesh, devices=tpus)
        kind, available = tpus[0].device_kind, tpu_compile.get_available_memory(tpus[0])
    else:
        mesh = mesh_lib.abstract_mesh(devices or jax.device_count(), **config.mesh)
        kind = hardware.device_kind(chip) if chip else jax.devices()[0].device_kind
        available = hardware.chip_of(kind).memory
    num_shards = mesh_lib.num_batch_shards(mesh)
    check_batch(config, num_shards)
    plan = memory.plan_memory(config, experiment, mesh)
    yield from plan.describe(mfu or 0.5, kind, available)
    if tpus:
        lower = lambda n: programs.lower_train_step(config, experiment, mesh, n, "tpu")
        step, flops = num_shards * config.accumulate, plan.flops / mesh.size
        program = SliceProgram(topology, tpus[0], lower, config.batch_size, step, flops)
        yield from program.describe(once)


def plan_sampling(
    config: Any, batch_size: int, *, topology: str | None, once: bool = False
) -> Iterator[str]:
    """Yields the lines of a plan of drawing one batch of samples."""
    if not topology:
        raise UserError("--plan needs --topology here: samples are planned for TPUs")
    # each host draws batches of its own
    devices, num_hosts = tpu_compile.get_host_devices(topology)
    mesh = mesh_lib.make_mesh(data=-1, fsdp=1, devices=devices)
    experiment, around = programs.with_sampling_precision(
        config, build_experiment(config), "tpu"
    )
    size = -(-batch_size // mesh.size) * mesh.size
    yield (
        f"{type(experiment.model).__name__}, {experiment.sampler}, guidance "
        f"{experiment.guidance}, precision {config.precision.model}"
    )
    yield f"{num_hosts} hosts of {mesh.size} chips, each with own batches of {size}"
    lower = lambda n: programs.lower_sampling(experiment, mesh, n, around)
    yield from SliceProgram(topology, devices[0], lower, size, mesh.size).describe(once)
