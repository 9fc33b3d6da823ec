"""Several hosts as one run: they meet, compare what they are, and end together.

Nothing here does anything on a single machine. A script calls join() before it touches
a device; process 0 alone prints and writes, all of them compute.
"""

import contextlib
import ctypes
import os
import signal
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from sit_jax import cluster, greeting, opening
from sit_jax.errors import UserError
from sit_jax.files import absolute_path, lock, require_writable, sha256
from sit_jax.numbered import Numbered
from sit_jax.party import Party

LONGEST = 86_400  # seconds of a limit; the kernel takes no more than 36 hours
PREEMPTION = "jax_enable_preemption_service"

_place = None  # which of how many this process is, if it is not alone
_party = None  # of this process, as jax.distributed has one state for each
_jax_heeds = False  # whether SIGTERM is JAX's
_remedy = None  # () -> a sentence: how to go on when a process is gone


def add_flags(parser):
    """What join() wants to know."""
    add = cluster.add_flags(parser)
    add("--join-timeout", type=float, default=300, metavar="S", help="seconds to meet")
    add("--heartbeat-timeout", type=float, default=100, metavar="S", help="of silence")


def join(args):
    """Meets the other processes, if there are any, and begins jax.distributed.

    Afterwards the processes are known to have the same code, packages, arguments and
    kind of devices. What goes to stderr carries the number of the process, and only
    process 0 has a stdout.
    """
    global _place, _party
    for name in ("join_timeout", "heartbeat_timeout"):
        if not 1 <= getattr(args, name) <= LONGEST:
            flag = f"--{name.replace('_', '-')} {getattr(args, name):g}"
            raise UserError(f"{flag}: from 1 to {LONGEST:,} seconds")
    seconds, silence = args.join_timeout, args.heartbeat_timeout
    place = _place = cluster.place(args, seconds)
    if place is None:
        return
    words = f"process {place.index} of {place.count}: "
    sys.stderr = Numbered(sys.stderr, words, first())
    _party = Party(place, greeting.hello(), seconds, silence, _say_lost)
    greeting.require_alike(_party.hellos)
    if place.index:
        _lose_stdout()
        _delay_abort()
    _begin(place, seconds, silence)
    print(greeting.described(_party.hellos), flush=True)
    with _party.within(seconds, "find its devices"):
        here = jax.local_devices()
        found = f"{len(here)} x {here[0].device_kind}"
        require_same("the devices", found, "all processes need as many of one kind")
    print(f"each of {place.count} processes has {found}", flush=True)


def several():
    return _party is not None


def index():
    """The number of this process, without touching a device."""
    return _place.index if _place else 0


def count():
    return _place.count if _place else 1


def first():
    """Whether this process prints and writes; it must not compute alone."""
    return index() == 0


@contextlib.contextmanager
def alone(folder, name="lock"):
    """locks.alone() of a run: process 0 holds it, and the others wait until it does."""
    with lock(folder, name) if first() else contextlib.nullcontext():
        wait()
        yield


@contextlib.contextmanager
def making(path):
    """alone() of a run that makes what will be at a path: its lock lies beside that."""
    path = absolute_path(path)
    require_writable(path)
    with alone(path.parent, f"{path.name}.lock"):
        yield


def exchange(value):
    """-> values of all processes, each of JSON. All of them call this."""
    return _party.exchange(value) if _party else [value]


def wait():
    """Until all processes are here."""
    exchange(None)


def told(value):
    """-> process 0's value, for all."""
    return exchange(value)[0]


def told_array(array):
    """-> process 0's array, or None, for all; too large for the words of told()."""
    like = told(None if array is None else [array.shape, array.dtype.str])
    if like is None or not several():
        return array
    if not first():
        array = np.zeros(*like)
    return multihost_utils.broadcast_one_to_all(array)


def require_same(what, value, remedy):
    """Refuses a run whose processes do not have one value of JSON."""
    found = exchange(value)
    for i, other in enumerate(found):
        if other != found[0]:
            raise UserError(
                f"{what}: {found[0]} in {_party.name(0)}, {other} in {_party.name(i)}; "
                f"{remedy}"
            )


def require_same_files(*paths):
    """Refuses files that hosts read each for itself, where they are not the same.

    Nobody else compares what each of them puts on its own devices.
    """
    if not several():
        return
    each = exchange({path.name: sha256(path)[:12] for path in paths})
    for i, other in enumerate(each):
        for name in sorted(other.keys() | each[0].keys()):
            here, there = each[0].get(name, "missing"), other.get(name, "missing")
            if here != there:
                raise UserError(
                    f"{name} is not the same file everywhere: sha256 {here} in "
                    f"{_party.name(0)}, {there} in {_party.name(i)}; copy one to all"
                )


def require_shared(path):
    """Waits for process 0, and refuses hosts that do not see what it has written."""
    wait()
    blind = [i for i, seen in enumerate(exchange(path.exists())) if not seen]
    if blind:
        raise UserError(
            f"{_party.name(blind[0])} does not see {path}, which process 0 has "
            "written; it must be on a file system that all hosts share"
        )


def heed_stops():
    """-> whether SIGTERM is JAX's from here on, for stop_at(), to be called soon.

    Some of JAX's names for it are private. A JAX without them leaves SIGTERM to us.
    """
    global _jax_heeds
    try:
        from jax._src import distributed

        jax.config.update(PREEMPTION, True)
        distributed.global_state.initialize_preemption_sync_manager()
        _jax_heeds = True
    except (ImportError, AttributeError):
        _jax_heeds = False
    return _jax_heeds


def stop_at(step, asked):
    """Whether one of the processes was asked to stop after this step.

    Steps count from 1 in all processes alike, which all call this after each. The
    answer is yes at the same step everywhere: JAX agrees on the next that none has had.
    Where JAX does not heed SIGTERM, they tell each other after each step whether they
    were `asked`.
    """
    if _jax_heeds:
        return multihost_utils.reached_preemption_sync_point(step)
    return any(exchange(asked))


def on_loss(remedy):
    """remedy() -> a sentence: how to go on when a process is gone."""
    global _remedy
    _remedy = remedy


def end(words, code):
    """Says to the other processes why this one ends; they end too."""
    if _party:
        _party.end(words, code)


def leave():
    """The good end, of all at once."""
    global _place, _party
    if _party:
        _party.close()
        jax.distributed.shutdown()
        _place = _party = None


def _say_lost(name, words):
    name = f"{opening.name()}: {name}"
    remedy = _remedy() if _remedy else "the same command goes on with what is there"
    text = f"is gone without a word; {remedy}" if words is None else f"ended: {words}"
    print(f"{name} {text}", file=sys.stderr, flush=True)


def _begin(place, seconds, silence):
    with contextlib.suppress(AttributeError):  # as in heed_stops()
        # it would note SIGTERM before anyone heeds it
        jax.config.update(PREEMPTION, False)
    jax.distributed.initialize(
        *(place.address, place.count, place.index, place.devices),
        cluster_detection_method="deactivate",
        initialization_timeout=int(seconds),
        heartbeat_timeout_seconds=int(silence),
        shutdown_timeout_seconds=int(seconds),
    )


def _lose_stdout():
    """Of C++ too: Gloo tells of its connections, from two threads at once."""
    sys.stdout = open(os.devnull, "w")
    os.dup2(sys.stdout.fileno(), 1)


def _delay_abort():
    """Gives us time to say that process 0 is gone.

    JAX's client aborts within milliseconds of it. A handler gets its signal's number:
    sleep(SIGABRT) is six seconds, and then abort goes on as it would have.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
