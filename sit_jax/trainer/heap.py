"""The memory of a CPU's temporaries, kept from one step to the next.

XLA allocates a program's temporaries anew at every call, gigabytes in training. glibc
gets such blocks from Linux and gives them back, and Linux hands them out 4 KiB at a
time, as zeros. Here they come from a heap that is kept, in huge pages where there are.
It grows to about twice what is in use, since blocks do not fit into all of its gaps.

Compilation leaves tens of thousands of gaps between what it still holds. glibc looks
for room among them first, and holds a lock meanwhile that all of XLA's workers wait
for: a step is 6 to 12 % slower (docs/performance.md). So they are closed.
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
# Gaps of these sizes are closed: of larger ones there are few, and a step's temporaries
# may be to go there; of smaller ones glibc has a list for each size.
GAP, LARGE = 2**16, 2**22

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
    """Ends it but on a CPU whose machine has thrice the memory needed, in bytes.

    To be called after compilation, whose gaps are closed where it goes on.
    """
    if platform != "cpu" or 3 * needed > _memory():
        as_usual()
    else:
        close_gaps()


def as_usual():
    """What keep set, as glibc has it by itself: for a device with its own memory."""
    global kept
    libc, kept = _glibc(), False
    return libc is not None and all([libc.mallopt(*each) for each in USUAL.items()])


def close_gaps():
    """Fills small gaps before the heap's end, for good. -> bytes filled."""
    libc = _glibc() if kept else None
    if not hasattr(libc, "mallinfo2"):
        return 0  # not kept, or a glibc from before 2021
    libc.mallinfo2.restype = _Mallinfo
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    end = libc.sbrk(0) - libc.mallinfo2().keepcost  # after it, all is free
    held, size = [], 2**26
    while size >= GAP:
        block = libc.malloc(size)
        if block and block < end:
            held.append((block, size))
        else:
            libc.free(block)
            size = 4 * size // 5
    for block, size in held:
        if size > LARGE:
            libc.free(block)
    return sum(size for _, size in held if size <= LARGE)


class _Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks"
    _fields_ = [(name, ctypes.c_size_t) for name in (*names.split(), "keepcost")]


def _memory():
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _glibc():
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):
        return None  # musl's malloc has none
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    return libc


def _prefer_huge_pages(libc):
    """The heap grows over half of the machine's memory, none of which is touched."""
    rule = Path("/proc/sys/vm/overcommit_memory")
    if not rule.exists() or rule.read_text().strip() == "2":
        return  # by 2, what is not touched counts as well
    size = _memory() // 2
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if block := libc.malloc(size):
        start, end = -(-block // PAGE) * PAGE, (block + size) // PAGE * PAGE
        libc.madvise(start, end - start, MADV_HUGEPAGE)
        libc.free(block)
