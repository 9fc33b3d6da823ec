"""What the scripts share: arguments, and errors as one line with exit code 2."""

import argparse
import os
import signal
import sys
import threading
import warnings

from sit_jax.errors import UserError, one_line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see --help")


def parser(description):
    """An argparse parser whose mistakes are UserErrors; --config.x=y is left over."""
    epilog = "Any field of the config can be set: --config.model.depth=4"
    return _Parser(description=description, epilog=epilog, allow_abbrev=False)


def parse(arguments_parser, argv=None):
    """-> arguments, and the --config.x=y strings among them."""
    arguments, rest = arguments_parser.parse_known_args(argv)
    for argument in rest:
        if not argument.startswith("--config."):
            raise UserError(f"unknown argument {argument!r}; see --help")
    return arguments, rest


def run(main):
    """Runs a script's main: mistakes of the user end in one line, not a traceback."""
    name = os.path.basename(sys.argv[0])
    warnings.filterwarnings("ignore", module="orbax|grain|absl|PIL")
    try:
        code = main()
    except UserError as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        code = 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        line = one_line(f"{where}{error.strerror or error}")
        print(f"{name}: {line}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def script(main):
    """run() for a process of its own: after the line of an error, nothing follows.

    Threads of libraries that were in the middle of something would add tracebacks
    while Python shuts down. Orbax's add them when one of many reads or writes fails,
    and are kept quiet.
    """
    usual = sys.unraisablehook

    def hook(raised):
        if str(raised.exc_value) != "Event loop is closed":
            usual(raised)

    sys.unraisablehook = hook
    try:
        run(main)
    except SystemExit as end:
        if end.code:
            sys.stderr.flush()
            os._exit(end.code)
        raise


class Stop:
    """Inside it, the first SIGTERM or Ctrl-C only asks; the second one interrupts."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
