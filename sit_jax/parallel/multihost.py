"""Several processes as one run, by jax.distributed and multihost_utils.

A script calls initialize() before it uses a device. On a single machine nothing here
touches a device, and every function answers for one process.
"""

import argparse
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sit_jax import files
from sit_jax.errors import UserError
from sit_jax.ranges import AtLeast

JOIN_SECONDS = 300  # JAX gives up when a process has not come by then
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "numpy")
TORCHRUN = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
# JAX's words where it detects no cluster, or was in use before
ALONE = "coordinator_address should be defined|must be called before any JAX calls"
# How many processes srun and mpirun started; JAX finds out the rest by itself.
SIZES = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that initialize() reads. One machine alone needs none of them."""
    add = parser.add_argument_group("several hosts").add_argument
    add("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    add("--processes", metavar="N", type=AtLeast(1), help="1: this machine alone")
    add("--process", metavar="I", type=AtLeast(0), help="which one this is, from 0")
    lost = "after which a silent process counts as lost (100)"
    add("--heartbeat", metavar="SECONDS", type=AtLeast(1), default=100, help=lost)


def initialize(
    args: argparse.Namespace,
    heed_sigterm: bool = False,
    join_seconds: int = JOIN_SECONDS,
) -> None:
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
    place = _find_place(args, os.environ)
    count = place.get("num_processes")
    count = count or next((int(os.environ[n]) for n in SIZES if n in os.environ), None)
    if 1 in (count, args.processes):
        return
    if count:
        address = place.get("coordinator_address", "the address that JAX detects")
        waiting = f"waiting for {count} processes at {address}"
        print(f"{waiting}, at most {join_seconds} s", file=sys.stderr, flush=True)
    jax.config.update("jax_enable_preemption_service", heed_sigterm)
    try:
        jax.distributed.initialize(
            **place,
            initialization_timeout=join_seconds,
            heartbeat_timeout_seconds=args.heartbeat,
            shutdown_timeout_seconds=args.heartbeat,
        )
    except (ValueError, RuntimeError) as error:
        if count or not re.search(ALONE, str(error)):
            raise
        return
    if not is_primary():
        sys.stdout = open(os.devnull, "w")
    installed = metadata.distributions()
    versions = {d.name: d.version for d in installed if d.name in PACKAGES}
    assert_equal("packages", versions, "install the same in all processes")
    devices = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
    assert_equal("devices", devices, "all processes need as many of one kind")
    print(f"{process_count()} processes, each with {devices}", flush=True)


def shares_work_only(args: argparse.Namespace) -> bool:
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


def all_gather(value: Any) -> list:
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


def broadcast(value: Any) -> Any:
    """Returns process 0's value, made of JSON, in all processes."""
    return all_gather(value if is_primary() else None)[0]


def broadcast_array(array: np.ndarray | None) -> np.ndarray | None:
    """Returns process 0's array, or None, in all processes."""
    like = broadcast(None if array is None else [array.shape, array.dtype.str])
    if like is None or process_count() == 1:
        return array
    array = array if is_primary() else np.zeros(*like)
    return multihost_utils.broadcast_one_to_all(array)


def assert_equal(what: str, value: Any, remedy: str) -> None:
    """Raises UserError in all processes if they do not have one value of JSON."""
    values = all_gather(value)
    for index, other in enumerate(values):
        if other != values[0]:
            raise UserError(
                f"{what}: {values[0]} in process 0, {other} in process {index}; "
                f"{remedy}"
            )


def assert_equal_files(*paths: Path) -> None:
    """Raises UserError if processes that read these files read different bytes."""
    if process_count() > 1:
        hashes = {path.name: files.sha256(path)[:12] for path in paths}
        remedy = "it is not the same file everywhere: copy one to all"
        assert_equal(f"sha256 of {paths[0]}", hashes, remedy)


def assert_shared(path: files.AnyPath) -> None:
    """Waits for process 0 and raises UserError if others do not see what it wrote."""
    barrier()
    seen = all_gather(path.exists())
    if not all(seen):
        raise UserError(
            f"process {seen.index(False)} does not see {path}, which process 0 wrote; "
            "it must be on a file system that all processes share"
        )


@contextlib.contextmanager
def lock(folder: files.PathLike, name: str = "lock") -> Iterator[None]:
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
def lock_output(path: files.PathLike) -> Iterator[None]:
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
    if process_count() > 1:
        return multihost_utils.reached_preemption_sync_point(step)
    return is_stop_requested


def _find_place(args, environ):
    """Returns arguments of jax.distributed.initialize, {} where JAX has to detect them.

    They come from the flags, or else from torchrun's variables.
    """
    flags = (args.coordinator, args.processes, args.process)
    more = {"cluster_detection_method": "deactivate"}
    if None not in flags:
        address, count, index = flags
    elif flags in ((None, None, None), (None, 1, None)):
        if not all(environ.get(name) for name in TORCHRUN):
            return {}
        host, port, count, index = (environ[name] for name in TORCHRUN)
        # torchrun itself listens at MASTER_PORT
        address = f"{host}:{int(port) + ('TORCHELASTIC_RUN_ID' in environ)}"
        count, index = int(count), int(index)
        if int(environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
            more["local_device_ids"] = int(environ["LOCAL_RANK"])
    else:
        raise UserError(
            "--coordinator, --processes and --process go together: "
            "--coordinator HOST:PORT --processes 2 --process 0"
        )
    if not re.fullmatch(r".+:\d+", address):
        raise UserError(f"the coordinator is {address!r}; it must be HOST:PORT")
    if index >= count:
        raise UserError(f"process {index} of {count}: they count from 0 to {count - 1}")
    place = {"num_processes": count, "process_id": index, **more}
    return {"coordinator_address": address, **place}
