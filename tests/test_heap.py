"""Memory that a CPU's programs free is theirs again, without asking Linux for it."""

import subprocess
import sys

import pytest

from sit_jax.trainer import heap

needs_glibc = pytest.mark.skipif(heap._glibc() is None, reason="needs Linux and glibc")

FAULTS = """
import resource, threading
import numpy as np
from sit_jax import heap

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(2**25)  # 256 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def in_a_thread():
    found = []
    each = threading.Thread(target=lambda: found.append(faults()))
    each.start()
    each.join()
    return found[0]

print(int({done}), faults(), faults(), in_a_thread())
"""


def faults(done):
    run = [sys.executable, "-c", FAULTS.format(done=done)]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    return [int(word) for word in out.split()]


@needs_glibc
def test_what_was_freed_is_used_again_by_every_thread():
    done, _, again, elsewhere = faults("heap.keep()")
    assert done and again < 50 and elsewhere < 50


@needs_glibc
def test_as_usual_each_block_comes_anew_from_linux():
    """128 huge pages, or 65,536 small ones."""
    done, _, again, elsewhere = faults("heap.keep() and heap.as_usual()")
    assert done and again >= 128 and elsewhere >= 128


def test_where_there_is_no_such_allocator_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    assert not heap.keep() and not heap.as_usual()
    monkeypatch.setattr(heap.sys, "platform", "darwin")
    assert not heap.keep()


@pytest.mark.parametrize(
    "platform, needed, ends", [("cpu", 2, False), ("cpu", 4, True), ("gpu", 2, True)]
)
def test_it_ends_without_a_cpu_or_room(platform, needed, ends, monkeypatch):
    called = []
    monkeypatch.setattr(heap, "_memory", lambda: 10)
    monkeypatch.setattr(heap, "as_usual", lambda: called.append(True))
    heap.settle(platform, needed)
    assert bool(called) == ends


GAPS = """
import ctypes
from sit_jax import heap

heap.keep()
libc = heap._glibc()
large = libc.malloc(2**26)
blocks = [libc.malloc(2**17 + 64 * i) for i in range(200)]
for block in [large, *blocks[::2]]:
    libc.free(block)
{before}
filled, again = heap.close_gaps(), heap.close_gaps()
whole, part = libc.malloc(2**26 - 2**22), libc.malloc(2**17)
inside = lambda block, first, last: int(first <= block <= last)
print(filled, again, inside(whole, large, blocks[0]), inside(part, *blocks[::199]))
"""


def gaps(before=""):
    run = [sys.executable, "-c", GAPS.format(before=before)]
    out = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    return [int(word) for word in out.split()]


@needs_glibc
def test_gaps_between_what_is_held_are_closed_once():
    """A hundred of 128 KiB or a little more; one of 64 MiB may be used again."""
    filled, again, in_large, in_small = gaps()
    assert 0.6 * 100 * 2**17 < filled < 0.5 * 2**26
    assert again < 2**20 and in_large and not in_small


@needs_glibc
def test_as_usual_gaps_are_left_to_be_used():
    filled, _, _, in_small = gaps("heap.as_usual()")
    assert filled == 0 and in_small


def test_gaps_are_closed_where_the_heap_is_kept(monkeypatch):
    called = []
    monkeypatch.setattr(heap, "_memory", lambda: 10)
    monkeypatch.setattr(heap, "close_gaps", lambda: called.append(True))
    heap.settle("cpu", 2)
    assert called
