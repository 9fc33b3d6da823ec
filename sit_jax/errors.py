"""The one exception that is shown to users as a line, and how others become one."""

import logging

LONGEST = 1000  # characters


def hush(name, handler=None):
    """Keeps a library's log from the console: what it logs, it raises too."""
    logger = logging.getLogger(name)
    logger.propagate = False
    logger.addHandler(handler or logging.NullHandler())


def one_line(message):
    """Returns a message fit for a terminal: names from a file may hold anything."""
    line = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in str(message)
    )
    if len(line) <= LONGEST:
        return line
    return f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"


def first_line(error):
    """Returns the first line of an exception's message, or its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class UserError(ValueError):
    """A mistake that the user can correct: one line with the value and the remedy."""
