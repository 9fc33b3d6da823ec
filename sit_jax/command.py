"""What the scripts share: arguments, and errors as one line with exit code 2."""

import argparse
import contextlib
import difflib
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings

from sit_jax import hosts, interrupts, opening
from sit_jax.errors import UserError, code_of, one_line
from sit_jax.files import describe_storage_error

SYMPTOM = 3.0  # seconds in which the loss of a process is noticed as its cause


INTERRUPTED = "interrupted; the same command goes on, or begins again"

_last_words = INTERRUPTED, 130  # and the exit code


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        # a number's own words follow its flag: --num 0: a whole number of at least 1
        said = re.sub(r"^argument ([^:]*): ", r"\1 ", message)
        said = said.replace("invalid choice: ", "").replace("(choose from ", "(one of ")
        raise UserError(f"{said}; see --help")


def parser(description):
    """An argparse parser whose mistakes are UserErrors; --config.x=y is left over."""
    epilog = "Any field of the config can be set: --config.model.depth=4"
    words = {"prog": opening.name(), "description": description, "epilog": epilog}
    return _Parser(**words, allow_abbrev=False)


def parse(arguments_parser, argv=None):
    """-> arguments, and the --config.x=y strings among them."""
    arguments, rest = arguments_parser.parse_known_args(argv)
    for argument in rest:
        if not argument.startswith("--config."):
            near = _near(argument, arguments_parser)
            raise UserError(f"unknown argument {argument!r}; {near}")
    for name, value in vars(arguments).items():
        setattr(arguments, name, _plain(name, value))
    return arguments, rest


def _near(argument, arguments_parser):
    """What may have been meant."""
    flags = re.findall(r"--[\w-]+", arguments_parser.format_help())
    close = difflib.get_close_matches(argument.partition("=")[0], flags, 1)
    return f"did you mean {close[0]}?" if close else "see --help"


def _plain(name, value):
    """A word or several of an argument, with the home folder in the place of ~."""
    if isinstance(value, list):
        return [_plain(name, each) for each in value]
    if value == "":
        flag = f"--{name.replace('_', '-')}"
        raise UserError(f"{flag} is empty; give it a value, or leave it out")
    return os.path.expanduser(value) if isinstance(value, str) else value


def run(main):
    """Runs a script's main: mistakes of the user end in one line, not a traceback.

    Of several processes each says its number, and an error ends them all.
    """
    warnings.filterwarnings("ignore", module="orbax|grain|absl|PIL")
    try:
        code = main()
        hosts.leave()
    except UserError as error:
        code = _ended(str(error), code_of(error.__cause__))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        words = str(error.strerror or error) or type(error).__name__
        code = _ended(f"{where}{words}", code_of(error))
    except KeyboardInterrupt:
        code = _ended(INTERRUPTED, 130)
    except Exception as error:
        if said := describe_storage_error(error):
            sys.exit(_ended(said, code_of(error)))
        if not hosts.several():
            raise
        time.sleep(SYMPTOM)
        code = _ended(f"{type(error).__name__}: {error}".splitlines()[0], 1)
        traceback.print_exc()
    sys.stdout.flush()
    sys.exit(code)


def _ended(words, code):
    """Says why this process ends, to the others and on the console; -> code."""
    words = one_line(words)
    hosts.end(words, code)
    print(f"{opening.name()}: {words}", file=sys.stderr)
    return code


def _left():
    """Ends from a thread, while the main one is where no signal reaches it."""
    code = _ended(*_last_words)
    sys.stderr.flush()
    os._exit(code)


def script(main):
    """run() for a process of its own: after the line of an error, nothing follows.

    Threads of libraries that were in the middle of something would add tracebacks
    while Python shuts down. Orbax's add them when one of many reads or writes fails,
    and are kept quiet.
    """
    usual = sys.unraisablehook

    def hook(raised):
        if raised.exc_type is KeyboardInterrupt:  # dropped, as interrupts.py says
            interrupts.tidy()
            _left()
        if str(raised.exc_value) != "Event loop is closed":
            usual(raised)

    sys.unraisablehook = hook
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that are not UTF-8
    interrupts.watch(_left)
    opening.over()
    try:
        run(main)
    except SystemExit as end:
        if end.code:
            sys.stderr.flush()
            os._exit(end.code)
        opening.all_is_done()
        raise


class Stop:
    """Inside it, the first SIGTERM or Ctrl-C only asks; the second one interrupts.

    Of several processes one is asked and all stop, after the same step. outlook: None,
    or () -> what is waited for then, in words.
    """

    def __init__(self):
        self.asked, self.outlook = False, None
        self._handed_on = False  # whether SIGTERM is JAX's

    def __enter__(self):
        self._before = {}
        self._patience = interrupts.patience()
        self._patience.__enter__()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    @contextlib.contextmanager
    def compiling(self, step):
        """Inside, nothing is done that `step` has not saved: a signal may end it all.

        XLA's compiler takes minutes and hears nothing. Several processes end together;
        afterwards, SIGTERM is JAX's.
        """
        global _last_words
        before = _last_words
        words = f"stopped while compiling, after step {step}"
        _last_words = said = f"{words}; the same command goes on from there", 0
        try:
            with interrupts.impatience():
                yield
            if hosts.several():
                self._hand_on()
        finally:
            _last_words = before
        if self.asked:
            sys.exit(_ended(*said))

    def after(self, step):
        """Whether to stop after this step; they are counted from 1 as it is begun."""
        return hosts.stop_at(step, self.asked) if hosts.several() else self.asked

    def now(self):
        """The same of a process that is alone, at any moment."""
        return self.asked and not hosts.several()

    def __exit__(self, *error):
        self._patience.__exit__(None, None, None)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hand_on(self):
        """SIGTERM to JAX, if it takes it; if it has come already, all end from here."""
        if hosts.heed_stops():
            self._before.pop(signal.SIGTERM, None)
            self._handed_on = True
        if self.asked:
            interrupts.tidy()  # closing would wait for processes that are gone
            _left()

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        if self.outlook:
            words = f"{self.outlook()}; Ctrl-C again ends without it"
            # print() may be what was interrupted
            os.write(2, f"{opening.name()}: {words}\n".encode())
        if self._handed_on:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX's, which tells the others
