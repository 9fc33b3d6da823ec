"""--plan: what a run would hold, compute and send, printed instead of running it."""

import jax

from sit_jax.errors import UserError
from sit_jax.experiment import check_batch
from sit_jax.parallel import hardware
from sit_jax.parallel.mesh import abstract_mesh, make_mesh, num_batch_shards
from sit_jax.planning import plan, pod, program, topology
from sit_jax.ranges import COUNT, Above

FLAGS = ("devices", "chip", "mfu", "topology", "once")


def add_flags(parser):
    group = parser.add_argument_group("a plan, for devices that need not exist")
    add = group.add_argument
    add("--plan", action="store_true", help="print it instead of running")
    add("--topology", metavar="v5p:4x4x8", help="compile for this TPU slice (libtpu)")
    add("--once", action="store_true", help="do not look for the largest batch")
    add("--devices", type=COUNT, metavar="N", help="how many; default: those here")
    add("--chip", metavar="NAME", help=", ".join(hardware.CHIPS))
    add(
        "--mfu",
        type=Above(0.0, 1.0),
        metavar="X",
        help="of the peak; else 0.5",
    )


def check(args):
    """Refuses flags of a plan without one, and values that none can have."""
    given = [flag for flag in FLAGS if getattr(args, flag) not in (None, False)]
    if given and not args.plan:
        raise UserError(f"--{given[0]} goes with --plan")
    if args.topology and (args.devices or args.chip):
        raise UserError("--topology says which chips and how many; give it alone")


def training(args, config):
    """Prints the plan of a training run; -> exit code."""
    # first, for libtpu is not to look for a TPU here when JAX finds its devices
    devices = topology.devices(args.topology) if args.topology else None
    parts = program.training_recipe(config)
    if devices:
        mesh = make_mesh(**config.mesh, devices=devices)
    else:
        count = args.devices or jax.device_count()
        mesh = abstract_mesh(count, **config.mesh)
    check_batch(config, num_batch_shards(mesh))
    kind = _kind(args, devices)
    chip = hardware.chip_of(kind)
    memory = topology.available(devices[0]) if devices else chip.memory
    made, share = plan.plan(config, parts, mesh), args.mfu or 0.5
    _print(*plan.lines(made, share, chip.peak_flops, memory, "TPU" in kind))
    if devices:
        lower = lambda batch: program.lowered_step(config, parts, mesh, batch, "tpu")
        step = num_batch_shards(mesh) * config.accumulate
        flops = made.flops / mesh.size
        _compile(args, devices[0], lower, config.batch_size, step, flops)
    return 0


def sampling(args, config):
    """Prints the plan of drawing one batch of samples; -> exit code."""
    if not args.topology:
        raise UserError("--plan needs --topology here: samples are planned for TPUs")
    # each host draws batches of its own, see sampling.studio
    devices, hosts = topology.host(args.topology)
    mesh = make_mesh(data=-1, fsdp=1, devices=devices)
    parts, around = program.sampling_recipe(config, "tpu")
    lower = lambda batch: program.lowered_sampling(parts, mesh, batch, around)
    size = -(-args.batch_size // mesh.size) * mesh.size
    name = type(parts.model).__name__
    _print(
        f"{name}, {parts.sampler}, guidance {parts.guidance}, "
        f"precision {config.precision.model}",
        f"{hosts} hosts of {mesh.size} chips, each with batches of its own of {size}",
    )
    _compile(args, devices[0], lower, size, mesh.size)
    return 0


def _kind(args, devices):
    if devices:
        return devices[0].device_kind
    if args.chip:
        return hardware.device_kind(args.chip)
    return jax.devices()[0].device_kind


def _compile(args, device, lower, batch, step, flops=None):
    name, made = args.topology, pod.compile_for(lower(batch), device)
    if made is None:
        _print(f"{name}, batch {batch}: DOES NOT FIT")
    else:
        _print(f"{name}, batch {batch}:", *pod.lines(made, flops, device.device_kind))
        _print(pod.HEADER, pod.row(name, batch, made))
    if args.once:
        return
    _print("looking for the largest batch that fits ...")
    most = pod.largest_batch(lower, device, {batch: made}, step, say=_print)
    _print(f"largest batch seen to fit: {most or f'none; less than {batch}'}")


def _print(*lines):
    print(*lines, sep="\n", flush=True)
