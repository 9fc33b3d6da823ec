"""Several processes as one run, by jax.distributed and multihost_utils.

A script calls initialize() before it uses a device. On a single machine nothing here
touches a device, and every function answers for one process.
"""

import contextlib
import json
import os
import sys
from importlib import metadata

import jax
import numpy as np
from jax.experimental import multihost_utils

from sit_jax import files
from sit_jax.errors import UserError
from sit_jax.ranges import AtLeast

JOIN_SECONDS = 300  # JAX gives up when a process has not come by then
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy")
TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
ALONE = (  # JAX's words where it detects no cluster, or was in use already
    "coordinator_address should be defined",
    "must be called before any JAX calls",
)
# How many processes srun and mpirun started; JAX finds out the rest by itself.
SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def add_flags(parser) -> None:
    """Adds the flags that initialize() reads. One machine alone needs none of them."""
    add = parser.add_argument_group("several hosts").add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    add(
        "--processes",
        type=AtLeast(1),
        metavar="N",
        help="of them; 1: this machine alone",
    )
    add("--process", type=AtLeast(0), metavar="I", help="which one this is, from 0")
    more = {"type": AtLeast(1), "metavar": "SECONDS", "default": 100}
    add("--heartbeat", **more, help="after which a silent process counts as lost")


def initialize(args, heed_sigterm=False, join_seconds=JOIN_SECONDS) -> None:
    """Joins the other processes of this run, if there are any.

    Which process this is comes from the flags, from torchrun's environment variables,
    or from what JAX detects: TPU pods, Slurm, Open MPI, Kubernetes. Afterwards all
    processes are known to have the same packages and devices, and only process 0 has a
    standard output.

    Args:
        args: arguments parsed with add_flags().
        heed_sigterm: SIGTERM is left to reached_stop() from here on; otherwise it ends
            a process as usual.
        join_seconds: how long JAX waits for all processes.

    Raises:
        UserError: the flags do not fit together, or the processes are not alike.
    """
    if args.processes == 1 or shares_work_only(args):
        return
    where = _given(args) or _from_torchrun(os.environ)
    count = where["num_processes"] if where else _cluster_size()
    if count == 1:
        return
    if count:
        at = where.get("coordinator_address", "the address that JAX detects")
        print(
            f"waiting for {count} processes at {at}, at most {join_seconds} s",
            file=sys.stderr,
            flush=True,
        )
    jax.config.update("jax_enable_preemption_service", heed_sigterm)
    seconds = {"heartbeat_timeout_seconds": args.heartbeat}
    seconds["shutdown_timeout_seconds"] = args.heartbeat
    try:
        jax.distributed.initialize(
            **where, **seconds, initialization_timeout=join_seconds
        )
    except (ValueError, RuntimeError) as error:
        if where or count or not any(reason in str(error) for reason in ALONE):
            raise
        return
    if not is_primary():
        sys.stdout = open(os.devnull, "w")
    _compare_processes()


def shares_work_only(args) -> bool:
    """Returns whether processes share work by their numbers alone and never meet."""
    numbered = None not in (args.process, args.processes)
    return args.coordinator is None and numbered


def process_index() -> int:
    """Returns the number of this process, counted from 0."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def process_count() -> int:
    """Returns how many processes make this run."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_primary() -> bool:
    """Returns whether this process prints and writes; all of them compute."""
    return process_index() == 0


def barrier() -> None:
    """Waits until all processes are here."""
    all_gather(None)


def all_gather(value) -> list:
    """Returns the values of all processes in their order; each is made of JSON."""
    if process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    longest = 2 ** int(max(sizes) - 1).bit_length()  # each length is another program
    rows = np.pad(text, (0, longest - len(text)))
    rows = multihost_utils.process_allgather(rows)
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)
    ]


def broadcast(value):
    """Returns process 0's value, made of JSON, in all processes."""
    return all_gather(value if is_primary() else None)[0]


def broadcast_array(array):
    """Returns process 0's array, or None, in all processes."""
    like = broadcast(None if array is None else [array.shape, array.dtype.str])
    if like is None or process_count() == 1:
        return array
    array = array if is_primary() else np.zeros(*like)
    return multihost_utils.broadcast_one_to_all(array)


def assert_equal(what: str, value, remedy: str) -> None:
    """Raises UserError in all processes if they do not have one value of JSON."""
    values = all_gather(value)
    for index, other in enumerate(values):
        if other != values[0]:
            raise UserError(
                f"{what}: {values[0]} in process 0, {other} in process {index}; "
                f"{remedy}"
            )


def assert_equal_files(*paths) -> None:
    """Raises UserError if processes that read these files read different bytes."""
    if process_count() > 1:
        hashes = {path.name: files.sha256(path)[:12] for path in paths}
        remedy = "it is not the same file everywhere: copy one to all"
        assert_equal(f"sha256 of {paths[0]}", hashes, remedy)


def assert_shared(path) -> None:
    """Waits for process 0 and raises UserError if others do not see what it wrote."""
    barrier()
    for index, is_seen in enumerate(all_gather(path.exists())):
        if not is_seen:
            raise UserError(
                f"process {index} does not see {path}, which process 0 wrote; it must "
                "be on a file system that all processes share"
            )


@contextlib.contextmanager
def lock(folder, name="lock"):
    """Holds the lock of a run's folder: process 0 takes it, the others wait for it."""
    with contextlib.ExitStack() as stack:
        refusal = None
        try:
            if is_primary():
                stack.enter_context(files.lock(folder, name))
        except UserError as error:
            refusal = str(error)
        if refusal := broadcast(refusal):
            raise UserError(refusal)
        yield


@contextlib.contextmanager
def lock_output(path):
    """Holds a lock that lies beside what a run will write."""
    path = files.absolute_path(path)
    files.require_writable(path)
    with lock(path.parent, f"{path.name}.lock"):
        yield


def reached_stop(step: int, is_stop_requested: bool) -> bool:
    """Returns whether to stop after this step, the same answer in all processes.

    All processes call it after every step. With several, JAX agrees on a step after
    SIGTERM reached one of them; alone, `is_stop_requested` decides.
    """
    if jax.distributed.is_initialized():
        return multihost_utils.reached_preemption_sync_point(step)
    return is_stop_requested


def _given(args):
    """Returns the place of this process from the flags, or {} without any."""
    flags = (args.coordinator, args.processes, args.process)
    if flags == (None, None, None):
        return {}
    if None in flags:
        raise UserError(
            "--coordinator, --processes and --process go together: "
            "--coordinator HOST:PORT --processes 2 --process 0"
        )
    return _place(*flags)


def _from_torchrun(environ):
    """Returns the place that torchrun's variables give, or {} without them."""
    if not all(environ.get(name) for name in TORCHRUN):
        return {}
    address, port, count, index = (environ[name] for name in TORCHRUN)
    # torchrun itself listens at MASTER_PORT
    port = int(port) + ("TORCHELASTIC_RUN_ID" in environ)
    place = _place(f"{address}:{port}", int(count), int(index))
    if int(environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
        place["local_device_ids"] = int(environ["LOCAL_RANK"])
    return place


def _place(address, count, index):
    port = address.rpartition(":")[2]
    if ":" not in address or not port.isdecimal():
        raise UserError(f"the coordinator is {address!r}; it must be HOST:PORT")
    if index >= count:
        raise UserError(f"process {index} of {count}: they count from 0 to {count - 1}")
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _cluster_size():
    """Returns how many processes srun or mpirun started, None if neither did."""
    return next((int(os.environ[name]) for name in SIZES if name in os.environ), None)


def _compare_processes():
    versions = {d.name: d.version for d in metadata.distributions()}
    versions = {name: versions[name] for name in PACKAGES if name in versions}
    assert_equal("packages", versions, "install the same in all processes")
    devices = jax.local_devices()
    devices = f"{len(devices)} x {devices[0].device_kind}"
    assert_equal("devices", devices, "all processes need as many of one kind")
    print(f"{process_count()} processes, each with {devices}", flush=True)
