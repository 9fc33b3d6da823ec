"""The one exception that is shown to users as a line, and exit codes of others."""

import errno
import logging
import os

LONGEST = 1000  # characters
MISTAKE, LATER = 2, 75  # exit codes: the same command would fail again, or may go on
NETWORK = {
    *(errno.ETIMEDOUT, errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED),
    *(errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ESTALE),
}
WORDS = {  # classes of aiohttp, google.auth and requests
    *("ClientConnectionError", "ClientPayloadError", "TransportError", "ProxyError"),
    "TimeoutError",
}


def code_of(error):
    """-> the exit code of an exception, or of none, that a network's fault may be."""
    status = getattr(error, "code", None)  # of an HTTP answer
    busy = isinstance(status, int) and (status in (408, 429) or 500 <= status < 600)
    told = any(kind.__name__ in WORDS for kind in type(error).__mro__)
    # tensorstore has the system's words and no number
    said = any(os.strerror(number) in str(error) for number in NETWORK)
    lost = busy or told or said or getattr(error, "errno", None) in NETWORK
    return LATER if lost else MISTAKE


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
