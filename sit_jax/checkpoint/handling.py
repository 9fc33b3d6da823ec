"""What saving and reading share: Orbax's handlers, and its errors in one line."""

import contextlib
import logging
import re

import orbax.checkpoint as ocp

from sit_jax import buckets
from sit_jax.checkpoint.whole import Damaged
from sit_jax.errors import UserError

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates; it also raises

TREES = ("params", "ema", "opt_state", "losses", "constants")


def handlers(names, of_tree):
    return {name: of_tree() for name in names} | {"meta": ocp.JsonCheckpointHandler()}


@contextlib.contextmanager
def plainly(directory, step=None):
    """Turns what the file system refuses into one line."""
    try:
        yield
    except OSError as error:
        if step is not None and isinstance(error, FileNotFoundError):
            raise Damaged(directory, step, str(error)[:200]) from error
        where = error.filename or directory
        raise UserError(f"{where}: {error.strerror or error}") from error
    except ValueError as error:  # what writing and reading arrays raises
        if reason := re.search(r": ([^:\[]+) \[os_error_code=", str(error)):
            raise UserError(f"{directory}: {reason[1]}") from error
        if step is None or not re.match(r"[A-Z_]{5,}: ", str(error)):
            raise
        raise Damaged(directory, step, f"{str(error)[:100]} ...") from error
    except Exception as error:
        if said := buckets.fault(error):
            raise UserError(f"{directory}: {said}") from error
        raise
