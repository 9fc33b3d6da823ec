"""The one exception that is shown to users as a line, and exit codes of others."""

import logging

LONGEST = 1000  # characters
MISTAKE, LATER = 2, 75  # exit codes: the same command would fail again, or may go on


def hush(name, handler=None):
    """Keeps a library's log from the console: what it tells there, it raises too."""
    logger = logging.getLogger(name)
    logger.propagate = False
    logger.addHandler(handler or logging.NullHandler())


def one_line(message):
    """A message fit for a terminal: names from a file may hold anything."""
    said = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in str(message)
    )
    if len(said) <= LONGEST:
        return said
    return f"{said[: LONGEST // 2]} ... {said[-LONGEST // 2 :]}"


class UserError(ValueError):
    """A mistake that the user can correct: one line with the value and the remedy."""
