"""Several real processes of a script on this machine, with one CPU device each.

Products over gloo. XLA optimises little: these programs run once.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time

from helpers import ROOT

FLAGS = (
    "--xla_force_host_platform_device_count=1 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
GLOO = r"(?m)^\[Gloo\] .*\n"  # what XLA's CPU backend prints in every process
LIMIT = 600  # seconds; these processes never wait for long unless one hangs


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def begin(count, *words, joined=True, homes=None):
    """-> processes of `python words...`; of one alone without any flag.

    homes: each one's home folder, where ~ leads: all have the same words.
    """
    address = f"localhost:{free_port()}"
    started = []
    for index in range(count):
        place = ("--coordinator", address, "--processes", count, "--process", index)
        more = place if joined and count > 1 else ()
        command = [sys.executable, *map(str, (*words, *more))]
        home = {"HOME": str(homes[index])} if homes else {}
        environ = {**os.environ, "XLA_FLAGS": FLAGS, **home}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env=environ, **pipes))
    return started


def end(started, limit=LIMIT):
    """-> (exit code, stdout, stderr) of each; what is left after the limit fails."""
    until, found = time.monotonic() + limit, []
    try:
        for process in started:
            said = process.communicate(timeout=max(until - time.monotonic(), 1))
            found.append((process.returncode, *said))
    finally:
        for process in started:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.communicate()
    return found


def run(count, *words, homes=None):
    """Runs to a good end -> stdout of process 0; the others must have said nothing."""
    found = end(begin(count, *words, homes=homes))
    for index, (code, out, err) in enumerate(found):
        assert code == 0, (index, out, err)
        assert index == 0 or not re.sub(GLOO, "", out), (index, out)
    return found[0][1]
