"""A script's first import: Ctrl-C during the others is a line as well.

JAX takes a second or two to import, and a KeyboardInterrupt in there is a traceback
through files that nobody wrote here. Nothing has been touched then. Packages that may
be why an import fails are told before it. And as the first that is registered, what
stands here is the last that is called at the end.
"""

import atexit
import os
import re
import signal
import sys

INTERRUPTED = "interrupted before it began"

_all_is_done = False


def name():
    """What a line of this process begins with: sample.py, sit_jax.checkpoint."""
    folder, file = os.path.split(sys.argv[0])
    return f"sit_jax.{os.path.basename(folder)}" if file == "__main__.py" else file


def over():
    """All is imported: from here on Ctrl-C is what it is to Python."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def all_is_done():
    """What is left is to end with exit code 0, without taking everything apart.

    Ctrl-C comes too late then: nothing is there to go on with, or to begin again.
    """
    global _all_is_done
    _all_is_done = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@atexit.register
def _end_at_once():
    # all threads have ended and all others that are registered were called; to take
    # JAX's modules apart takes a second more
    if _all_is_done:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _end(number, frame):
    # no exception, which a callback may drop: there is nothing to tidy
    os.write(2, f"{name()}: {INTERRUPTED}\n".encode())
    os._exit(130)


def _is_ours():
    """Whether this process runs a script of the repository, or python -m sit_jax.x."""
    if sys.argv[:1] == ["-m"]:  # which stands there until the module is found
        return any(re.match(r"(-\w*m)?sit_jax\.", word) for word in sys.orig_argv)
    file = getattr(sys.modules["__main__"], "__file__", None) or ""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.path.dirname(os.path.abspath(file)) == root


def _tell_versions():
    from sit_jax import versions

    for line in versions.of_this_environment():
        print(line, file=sys.stderr)


# not where Ctrl-C is not Python's: of a job in the background it is ignored
if _is_ours() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
if _is_ours():
    _tell_versions()
