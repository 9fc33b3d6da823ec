"""Signals while the main thread is where Python does not act on them."""

import signal
import subprocess
import sys
import time

import pytest

from sit_jax import interrupts

DEAF = """
import contextlib, ctypes, os, signal, sys
from sit_jax import interrupts

interrupts.GRACE = 0.3
signal.signal(signal.SIGINT, lambda *words: None)

def end():
    print("ended", flush=True)
    os._exit(7)

interrupts.watch(end)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # or it would wake up
deaf = ctypes.CDLL(None).usleep  # Python's handlers run when it has returned
with contextlib.ExitStack() as stack:
    for name in sys.argv[3:]:
        stack.enter_context(getattr(interrupts, name)())
    stack.enter_context(interrupts.made(int, lambda thing: print("tidied")))
    print("here", flush=True)
    deaf(int(sys.argv[1]))
with interrupts.patience():
    with interrupts.impatience():
        pass
    deaf(int(sys.argv[2]))
print("over")
"""


def begin(seconds, *blocks, more=0):
    """A process that is deaf in the blocks, and for `more` in others behind them."""
    times = (str(int(1e6 * each)) for each in (seconds, more))
    command = [sys.executable, "-c", DEAF, *times, *blocks]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    return process


@pytest.mark.parametrize("blocks", [(), ("patience", "impatience")], ids=["", "within"])
def test_a_deaf_process_is_ended_and_tidied(blocks):
    process = begin(30, *blocks)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=10)
    assert (said, process.returncode) == ("tidied\nended\n", 7)


def test_patience_waits_for_a_first_signal_and_not_for_a_second():
    process = begin(30, "patience")
    process.send_signal(signal.SIGINT)
    time.sleep(0.6)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=10)
    assert (said, process.returncode) == ("tidied\nended\n", 7)


def test_who_leaves_a_block_in_time_has_heard():
    """As when a compiler returns within the seconds of grace, and a step is saved."""
    process = begin(0.2, "patience", "impatience")
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=10)
    assert (said, process.returncode) == ("tidied\nover\n", 0)


def test_who_enters_a_block_has_heard_nothing():
    """As when the exception was dropped, and training begins in spite of it."""
    process = begin(0.1, more=30)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=10)
    assert (said, process.returncode) == ("tidied\nended\n", 7)


DROPS = """
import signal
from sit_jax import command, interrupts

class Dropping:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)

def main():
    with interrupts.made(int, lambda thing: print("tidied", flush=True)):
        one = Dropping()
        del one
        print("went on")
    return 0

command.script(main)
"""


def test_an_exception_that_python_drops_is_heard():
    """As in garbage collection; else it would go on for the seconds of grace."""
    found = subprocess.run(
        [sys.executable, "-c", DROPS], capture_output=True, text=True
    )
    assert (found.stdout, found.returncode) == ("tidied\n", 130)
    assert (
        found.stderr == "-c: interrupted; the same command goes on, or begins again\n"
    )


MAKES = """
import os, threading, time
from sit_jax import interrupts

begun = threading.Event()

def make():
    begun.set()
    time.sleep(0.3)
    print("made", flush=True)
    return "it"

def end():
    begun.wait()
    interrupts.tidy()
    os._exit(7)

threading.Thread(target=end).start()
with interrupts.made(make, lambda it: print("removed", it, flush=True)):
    time.sleep(30)
"""


def test_who_ends_a_process_waits_for_what_it_has_to_remove():
    found = subprocess.run(
        [sys.executable, "-c", MAKES], capture_output=True, text=True
    )
    assert (found.stdout, found.returncode) == ("made\nremoved it\n", 7), found


REMOVES = """
import os, threading, time
from sit_jax import interrupts

begun = threading.Event()

def remove(thing):
    begun.set()
    time.sleep(0.2)
    print("removed", thing, flush=True)

def end():
    begun.wait()
    interrupts.tidy()
    os._exit(7)

threading.Thread(target=end).start()
with interrupts.made(lambda: "it", remove):
    pass
time.sleep(5)
"""


def test_who_ends_a_process_waits_for_what_is_just_removed():
    """A lock's file was gone and its folder still there when the process ended."""
    found = subprocess.run(
        [sys.executable, "-c", REMOVES], capture_output=True, text=True
    )
    assert (found.stdout, found.returncode) == ("removed it\n", 7), found


LATE = """
import atexit, signal
from sit_jax import command

atexit.register(lambda: signal.raise_signal(signal.SIGINT))
command.script(lambda: 0)
"""


def test_a_run_that_has_done_all_is_not_interrupted_any_more():
    found = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True)
    assert (found.stdout, found.stderr, found.returncode) == ("", "", 0)


def test_five_seconds_are_enough():
    assert interrupts.GRACE < 4
