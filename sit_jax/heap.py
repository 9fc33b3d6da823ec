"""The memory of a CPU's temporaries, kept from one step to the next.

XLA allocates a program's temporaries anew at every call, gigabytes in training. glibc
gets such blocks from Linux and gives them back, and Linux hands them out 4 KiB at a
time, as zeros. Here they come from a heap that is kept, in huge pages where there are.
It grows to about twice what is in use, since blocks do not fit into all of its gaps.
"""

import ctypes
import os
import sys
from pathlib import Path

# by their numbers in glibc's malloc.h: no blocks of their own, nothing is given back,
# and one heap for all threads, since only the first one grows beyond 64 MB
MMAP_MAX, TRIM_THRESHOLD, ARENA_MAX = -4, -1, -8
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: -1, ARENA_MAX: 1}
USUAL = {MMAP_MAX: 65_536, TRIM_THRESHOLD: 2**17, ARENA_MAX: 8 * (os.cpu_count() or 1)}
MADV_HUGEPAGE = 14
PAGE = 2**21

kept = False  # whether it is, here


def keep():
    """-> whether it could be done. What is freed from here on stays this process's.

    To be called before JAX begins: threads that it starts earlier keep their own heaps.
    """
    global kept
    libc = _glibc()
    if libc is None or not all([libc.mallopt(*each) for each in KEPT.items()]):
        return False
    _prefer_huge_pages(libc)
    kept = True
    return True


def settle(platform, needed):
    """Ends it but on a CPU whose machine has thrice the memory needed, in bytes."""
    if platform != "cpu" or 3 * needed > _memory():
        as_usual()


def as_usual():
    """What keep set, as glibc has it by itself: for a device with its own memory."""
    libc = _glibc()
    return libc is not None and all([libc.mallopt(*each) for each in USUAL.items()])


def _memory():
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _glibc():
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None  # musl's malloc has none


def _prefer_huge_pages(libc):
    """The heap grows over half of the machine's memory, none of which is touched."""
    rule = Path("/proc/sys/vm/overcommit_memory")
    if not rule.exists() or rule.read_text().strip() == "2":
        return  # by 2, what is not touched counts as well
    size = _memory() // 2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if block := libc.malloc(size):
        start, end = -(-block // PAGE) * PAGE, (block + size) // PAGE * PAGE
        libc.madvise(start, end - start, MADV_HUGEPAGE)
        libc.free(block)
