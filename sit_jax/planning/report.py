"""--plan: what a run would hold, compute and send, printed instead of running it."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

import jax

from sit_jax.errors import UserError
from sit_jax.experiment import check_batch
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
    check_batch(config, mesh_lib.num_batch_shards(mesh))
    plan = memory.plan_memory(config, experiment, mesh)
    yield from describe_plan(plan, mfu or 0.5, kind, available)
    if tpus:
        yield from _compile_for_topology(
            topology,
            tpus[0],
            lambda n: programs.lower_train_step(config, experiment, mesh, n, "tpu"),
            batch=config.batch_size,
            step=mesh_lib.num_batch_shards(mesh) * config.accumulate,
            flops=plan.flops / mesh.size,
            once=once,
        )


def plan_sampling(
    config: Any, batch_size: int, *, topology: str | None, once: bool = False
) -> Iterator[str]:
    """Yields the lines of a plan of drawing one batch of samples."""
    if not topology:
        raise UserError("--plan needs --topology here: samples are planned for TPUs")
    # each host draws batches of its own
    devices, num_hosts = tpu_compile.get_host_devices(topology)
    mesh = mesh_lib.make_mesh(data=-1, fsdp=1, devices=devices)
    experiment, around = programs.build_sampling_experiment(config, "tpu")
    size = -(-batch_size // mesh.size) * mesh.size
    yield (
        f"{type(experiment.model).__name__}, {experiment.sampler}, guidance "
        f"{experiment.guidance}, precision {config.precision.model}"
    )
    yield f"{num_hosts} hosts of {mesh.size} chips, each with own batches of {size}"
    yield from _compile_for_topology(
        topology,
        devices[0],
        lambda n: programs.lower_sampling(experiment, mesh, n, around),
        batch=size,
        step=mesh.size,
        once=once,
    )


def describe_plan(
    plan: memory.MemoryPlan, mfu: float, kind: str, available: float | None
) -> Iterator[str]:
    """Yields a plan in lines.

    Args:
      plan: the plan.
      mfu: the share of a device's peak that a step's time is reckoned with.
      kind: the device_kind of the devices.
      available: bytes of a device, where known.
    """
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items())
    yield (
        f"{type(plan.model).__name__}, {plan.num_parameters:,} parameters, on "
        f"{plan.mesh.size} devices ({axes}), batch {plan.batch_size}"
    )
    yield f"{'GB':24} {'in all':>9} {'a device':>9}"
    total = sum(whole for whole, _ in plan.items.values())
    for name, sizes in (*plan.items.items(), ("total", (total, plan.device_bytes))):
        yield f"{name:24} {sizes[0] / 1e9:9.2f} {sizes[1] / 1e9:9.3f}"
    if available:
        free = available - plan.device_bytes
        words = f"{free / 1e9:.1f} GB free" if free > 0 else "DOES NOT FIT"
        yield (
            f"a device has {available / 1e9:.1f} GB: {words}, before activations and "
            "what else layers need"
        )
    yield from plan.unsplit
    yield from plan.ragged if "TPU" in kind else ()
    yield (
        f"{plan.flops / 1e12:.4g} TFLOP a step, "
        f"{plan.flops / plan.batch_size / 1e9:.4g} GFLOP an image"
    )
    if peak := hardware.chip_of(kind).peak_flops:
        seconds = plan.flops / (plan.mesh.size * peak * mfu)
        yield (
            f"at {mfu:.0%} of {peak / 1e12:g} TFLOP/s: {seconds:.4g} s a step, "
            f"{plan.batch_size / seconds:,.0f} images/s"
        )


def _compile_for_topology(name, device, lower, *, batch, step, once, flops=None):
    """Yields lines about the program of a batch, and the largest batch that fits.

    lower(batch) returns a lowered program; flops: of one chip.
    """
    compile_batch = lambda n: tpu_compile.compile_for_tpu(lower(n), device)
    program = compile_batch(batch)
    if program is None:
        yield f"{name}, batch {batch}: DOES NOT FIT"
    else:
        yield f"{name}, batch {batch}:"
        kind = device.device_kind
        yield from tpu_compile.describe_program(program, flops, kind)
    if once:
        return
    yield "looking for the largest batch that fits ..."
    most = tpu_compile.find_largest_batch(compile_batch, batch, program, step)
    yield f"largest batch seen to fit: {most or f'none; less than {batch}'}"
