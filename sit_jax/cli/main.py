"""The border of every command: arguments, errors as one line, exit codes, stop signals.

Exit codes: 0 done, or stopped with the step saved; 1 an error of the program or of the
network; 2 a mistake of the user, which the same command would repeat; 130 interrupted;
141 nobody reads standard output any more, as in `train.py ... | head`.
"""

import argparse
import difflib
import errno
import functools
import os
import re
import select
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, Self

from sit_jax.errors import UserError, one_line
from sit_jax.files import describe_storage_error
from sit_jax.parallel import multihost

STDOUT = 1
NETWORK = {errno.ESTALE, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN}


class Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors; has_config: --config.x=y are taken too."""

    has_config = True

    def error(self, message):
        # a number's own words follow its flag: --num 0: a whole number of at least 1
        message = re.sub(r"^argument ([^:]*): ", r"\1 ", message)
        message = message.replace("invalid choice: ", "")
        message = message.replace("(choose from ", "(one of ")
        raise UserError(f"{message}; see --help")


def make_parser(description: str, has_config: bool = True) -> Parser:
    """Returns a parser of a script that takes --config.x=y, or has no config."""
    parser = Parser(program_name(), description=description, allow_abbrev=False)
    parser.has_config = has_config
    if has_config:
        parser.epilog = "Any field of the config can be set: --config.model.depth=4"
    return parser


def parse_args(
    parser: Parser, argv: list[str] | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """Parses a command line.

    Returns:
        The arguments, with the home folder for ~, and the --config.x=y among them.

    Raises:
        UserError: an argument is unknown, wrong or empty.
    """
    args, overrides = parser.parse_known_args(argv)
    for argument in overrides:
        if not (parser.has_config and argument.startswith("--config.")):
            hint = _similar_flag(argument, parser)
            raise UserError(f"unknown argument {argument!r}; {hint}")
    for name, value in vars(args).items():
        setattr(args, name, _expand(name, value))
    return args, overrides


def entry_point(body: Callable[[], int | None]) -> Callable[[], NoReturn]:
    """Makes a script's main() of a function that returns an exit code or None.

    main() prints a user's mistake as one line instead of a traceback, and always ends
    in SystemExit, but for unexpected exceptions, which it lets through.
    """

    @functools.wraps(body)
    def main():
        warnings.filterwarnings("ignore", module="orbax|grain|absl|PIL")
        sys.stdout.reconfigure(errors="backslashreplace")  # for names not in UTF-8
        try:
            code = body()
            multihost.barrier()  # or the first to end would wait for JAX's heartbeat
            sys.stdout.flush()
        except UserError as error:
            code = _report(error, _exit_code(error.__cause__))
        except OSError as error:
            if _is_stdout_closed():
                sys.exit(141)  # what a shell gives for SIGPIPE
            reason = str(error.strerror or error) or type(error).__name__
            place = f"{error.filename}: " if error.filename else ""
            code = _report(f"{place}{reason}", _exit_code(error))
        except KeyboardInterrupt:
            code = _report(
                "interrupted; the same command goes on, or begins again", 130
            )
        except Exception as error:
            if not (reason := describe_storage_error(error)):
                raise
            code = _report(reason, _exit_code(error))
        sys.exit(code)

    return main


class StopSignal:
    """A context in which SIGTERM or Ctrl-C sets `is_set`; a second one acts as usual.

    With several processes JAX heeds SIGTERM (multihost.reached_stop), and Ctrl-C is
    handed to it.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._previous = {}

    def __enter__(self) -> Self:
        several = multihost.process_count() > 1
        for number in [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]:
            self._previous[number] = signal.signal(number, self._set)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _set(self, number, frame):
        self.is_set = True
        self.__exit__()
        # print() may be what was interrupted
        line = "stops after this step and saves it; Ctrl-C again ends without it"
        os.write(2, f"{program_name()}: {line}\n".encode())
        if multihost.process_count() > 1:
            signal.raise_signal(signal.SIGTERM)


def program_name() -> str:
    """Returns what lines of this process begin with: sample.py, sit_jax.checkpoint."""
    path = Path(sys.argv[0])
    return f"sit_jax.{path.parent.name}" if path.name == "__main__.py" else path.name


def _is_stdout_closed():
    """Returns whether nobody reads standard output; if so, nothing more goes there."""
    poll = select.poll()
    poll.register(STDOUT, 0)
    is_closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if is_closed:  # or Python would complain of what is still in its buffer
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)
    return is_closed


def _report(message, code):
    name = program_name()
    if multihost.process_count() > 1:
        name = f"process {multihost.process_index()}: {name}"
    print(f"{name}: {one_line(message)}", file=sys.stderr, flush=True)
    return code


def _exit_code(error):
    """Returns 1 where the network failed and the same command may go on, else 2."""
    is_network = isinstance(error, (ConnectionError, TimeoutError))
    is_network = is_network or (isinstance(error, OSError) and error.errno in NETWORK)
    return 1 if is_network else 2


def _similar_flag(argument, parser):
    flags = re.findall(r"--[\w-]+", parser.format_help())
    similar = difflib.get_close_matches(argument.partition("=")[0], flags, 1)
    return f"did you mean {similar[0]}?" if similar else "see --help"


def _expand(name, value):
    """Returns an argument's word or words with the home folder for ~."""
    if isinstance(value, list):
        return [_expand(name, word) for word in value]
    if value == "":
        flag = f"--{name.replace('_', '-')}"
        raise UserError(f"{flag} is empty; give it a value, or leave it out")
    return os.path.expanduser(value) if isinstance(value, str) else value
