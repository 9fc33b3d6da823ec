"""Keeps compiled programs, and looks after the devices and memory they run on.

JAX's persistent cache keeps compiled programs between runs; `ReplicaCheck` compares
what several devices hold alike; `keep_freed_memory` makes steps on a CPU quicker.
"""

import collections
import contextlib
import ctypes
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, UInt32

from sit_jax.checkpoint import leaves_by_name
from sit_jax.errors import UserError

CACHE_VARIABLE = "SIT_JAX_CACHE"  # another folder, or empty for none


def use_compilation_cache(environ: Mapping[str, str] = os.environ) -> None:
    """Turns JAX's cache on, in ~/.cache/sit_jax unless a variable names a folder.

    Call it after jax.distributed has begun: of several processes only the first one
    writes, and they have to know which of them is that.
    """
    folder = environ.get(CACHE_VARIABLE, "~/.cache/sit_jax")
    if folder and jax.config.jax_compilation_cache_dir is None:
        # no place to keep anything, as without a home, is no reason not to run
        with contextlib.suppress(OSError, RuntimeError):
            path = Path(folder).expanduser()
            path.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(path))


# ---- replicas ----


class ReplicaCheck:
    """Compares the copies of arrays that several devices hold alike.

    A memory or a link at fault changes a copy, and the loss stays plausible. So each
    device sums up what it holds, and the sums are compared.

    Args:
        every: Compares at every so many steps, and at each save. 0 is never.
        state: A tree of arrays, all on one mesh.
    """

    def __init__(self, every: int, state: Any):
        self._groups = {n: _replicas(x) for n, x in leaves_by_name(state).items()}
        is_replicated = any(len(g) > 1 for gs in self._groups.values() for g in gs)
        self._every = every if is_replicated else 0
        if self._every:  # compiled now, and not at a save that is waited for
            self._mesh = jax.tree.leaves(state)[0].sharding.mesh
            self._sums = device_sums(self._mesh, state).lower(state).compile()

    def is_due(self, step: int) -> bool:
        """Returns whether `step` is one at which the copies are compared."""
        return self._every > 0 and step % self._every == 0

    def check(self, step: int, state: Any) -> None:
        """Refuses a state of which a device holds another copy than the others."""
        if not self._every:
            return
        sums = np.asarray(self._sums(state))
        for column, (name, groups) in zip(sums.T, self._groups.items(), strict=True):
            by_device = dict(zip(self._mesh.devices.flat, column.tolist(), strict=True))
            for group in groups:
                values = collections.Counter(by_device[device] for device in group)
                usual, count = values.most_common(1)[0]
                if others := [d for d in group if by_device[d] != usual]:
                    names = (f"{d} (process {d.process_index})" for d in others)
                    raise UserError(
                        f"step {step}: {', '.join(names)} and {count} other devices "
                        f"hold different copies of {name}"
                    )


def device_sums(mesh: Mesh, state: Any) -> Callable[[Any], UInt32[Array, "devices n"]]:
    """Returns a function of the state that gives each device's sum of each leaf."""
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state)

    @jax.jit
    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs,),
        out_specs=PartitionSpec(),
        check_vma=False,  # that the copies are equal is what is asked
    )
    def sums(state: Any) -> Array:
        local = jnp.stack([_checksum(leaf) for leaf in jax.tree.leaves(state)])
        return jax.lax.all_gather(local, mesh.axis_names)

    return sums


def _checksum(leaf: Array) -> UInt32[Array, ""]:
    """Changes with any bit, as each element has an odd weight of its own."""
    leaf = leaf.astype(np.uint8) if leaf.dtype == bool else leaf
    bits = jax.lax.bitcast_convert_type(leaf, f"uint{8 * leaf.dtype.itemsize}")
    bits = bits.astype(np.uint32).reshape(-1)
    weights = 2 * jax.lax.iota(np.uint32, bits.size) * np.uint32(2654435761) + 1
    return jnp.sum(bits * weights, dtype=np.uint32)


def _replicas(leaf: jax.Array) -> list[list[jax.Device]]:
    """Returns groups of the devices that hold the same part of an array."""
    groups = collections.defaultdict(list)
    for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
        groups[str(index)].append(device)
    return list(groups.values())


# ---- memory of a CPU ----

# XLA allocates a program's temporaries anew at every call, gigabytes in training. glibc
# gets such blocks from Linux and gives them back, and Linux clears 4 KiB at a time. So
# freed memory is kept (docs/evidence/performance.md). Numbers of malloc.h: M_MMAP_MAX,
# M_TRIM_THRESHOLD, M_ARENA_MAX (one heap, as only the first grows beyond 64 MB).
KEEP = {-4: 0, -1: -1, -8: 1}
_is_kept = False
HUGE_PAGE, MADV_HUGEPAGE = 2**21, 14
DEFAULTS = {-4: 65_536, -1: 2**17, -8: 8 * (os.cpu_count() or 1)}


def keep_freed_memory(settings: Mapping[int, int] = KEEP) -> None:
    """Lets this process keep what it frees; call it before JAX starts its threads.

    The heap grows to about twice what is in use. Only glibc has these settings.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return
    global _is_kept
    _is_kept = settings is KEEP
    for option, value in settings.items():
        libc.mallopt(option, value)
    if _is_kept:  # in huge pages, over half of the memory; none is touched
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        size = _memory() // 2
        if block := libc.malloc(size):
            start, end = -(-block // HUGE_PAGE) * HUGE_PAGE, block + size
            libc.madvise(start, (end - start) // HUGE_PAGE * HUGE_PAGE, MADV_HUGEPAGE)
            libc.free(block)


def limit_kept_memory(program: Any) -> None:
    """Ends keep_freed_memory on accelerators, and where memory is short."""
    if not _is_kept:
        return
    sizes = program.memory_analysis()
    needed = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    needed *= jax.local_device_count()
    if jax.default_backend() != "cpu" or 3 * needed > _memory():
        keep_freed_memory(DEFAULTS)


def _memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
