"""Which process of how many this one is, and where process 0 can be reached.

Said by flags, by the environment variables that torchrun sets, or by what JAX itself
recognises: TPU pods, Slurm, Kubernetes jobs, Open MPI. On a single machine by nothing.
"""

import dataclasses
import os
import warnings

from sit_jax.errors import UserError

TORCH = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")


@dataclasses.dataclass(frozen=True)
class Place:
    """address: "host:port" of process 0; devices: those of this host, None: all."""

    address: str
    count: int
    index: int
    devices: list | None = None
    by: str = "flags"

    def __post_init__(self):
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise UserError(
                f"the coordinator is {self.address!r} ({self.by}); it must be HOST:PORT"
            )
        if self.count < 1:
            raise UserError(f"{self.count} processes ({self.by}); at least 1")
        if not 0 <= self.index < self.count:
            raise UserError(
                f"process {self.index} of {self.count} ({self.by}): they count from 0 "
                f"to {self.count - 1}"
            )

    @property
    def host(self):
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self):
        return int(self.address.rpartition(":")[2])


def add_flags(parser):
    """-> the function that adds to their group. One machine alone needs none."""
    add = parser.add_argument_group("several hosts").add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    add("--processes", type=int, metavar="N", help="of them; 1: this machine alone")
    add("--process", type=int, metavar="I", help="which one this is, from 0")
    return add


def apart(args):
    """Whether processes share work by their numbers alone, and never meet."""
    return args.coordinator is None and None not in (args.process, args.processes)


def place(args, seconds, environ=os.environ):
    """-> Place, or None where this process is alone. seconds: to look around for."""
    given = (args.coordinator, args.processes, args.process)
    if args.processes == 1 and args.coordinator is None:
        return None
    if None not in given:
        found = Place(*given)
    elif any(each is not None for each in given):
        raise UserError(
            "--coordinator, --processes and --process go together: "
            "--coordinator HOST:PORT --processes 2 --process 0"
        )
    else:
        found = _of_torch(environ) or _of_jax(seconds)
        if found is None:
            _require_no_half(environ)
    return found if found and found.count > 1 else None


def _of_torch(environ):
    """As torchrun says it, or whoever sets the same variables.

    torchrun itself listens at MASTER_PORT; the next port is taken then.
    """
    if not all(environ.get(name) for name in TORCH):
        return None
    number = lambda name: _whole(name, environ[name])
    port = number("MASTER_PORT") + ("TORCHELASTIC_RUN_ID" in environ)
    several = "LOCAL_WORLD_SIZE" in environ and number("LOCAL_WORLD_SIZE") > 1
    devices = [number("LOCAL_RANK")] if several and "LOCAL_RANK" in environ else None
    address = f"{environ['MASTER_ADDR']}:{port}"
    count, index = number("WORLD_SIZE"), number("RANK")
    return Place(address, count, index, devices, ", ".join(TORCH))


def _require_no_half(environ):
    """Refuses to be alone where only a part of torchrun's variables says otherwise."""
    lacking = [name for name in TORCH if not environ.get(name)]
    if environ.get("WORLD_SIZE", "1") not in ("", "1") and lacking:
        raise UserError(
            f"WORLD_SIZE is {environ['WORLD_SIZE']} without {' and '.join(lacking)}; "
            "set it too, or --processes 1 for this machine alone"
        )


def _whole(name, text):
    if not text.isdecimal():
        raise UserError(f"{name} is {text!r}; it must be a whole number")
    return int(text)


def _of_jax(seconds):
    """By JAX's own detection, without which none of jax.distributed is begun."""
    from jax._src.clusters import ClusterEnv  # only initialize() itself is public

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Kubernetes without its Python package
            found = ClusterEnv.auto_detect_unset_distributed_params(
                *(None, None, None, None), None, int(seconds)
            )
    except Exception as error:  # of as many kinds as there are clusters
        raise UserError(
            f"JAX sees a cluster but cannot tell this process's place in it ({error}); "
            "say it by --coordinator, --processes and --process, or --processes 1"
        ) from error
    address, count, index, devices = found
    if None in (address, count, index):
        return None
    return Place(address, count, index, devices, "JAX's detection of a cluster")
