"""Google's buckets as fsspec's gcsfs serves them: one connection, and plain errors."""

import functools
import logging
import os
import threading

from sit_jax.errors import UserError, hush

PATIENCE = 60.0  # seconds in which a bucket has to answer
LIBRARIES = ("gcsfs.", "aiohttp.", "google.auth.", "google.api_core.", "google.cloud.")


@functools.cache
def system():
    """The file system of all buckets. Listings are not kept: others write there too."""
    import fsspec

    hush("gcsfs", _heard)
    hush("fsspec")
    fsspec.config.conf.setdefault("gcs", {}).update(use_listings_cache=False)
    try:
        return fsspec.filesystem("gcs", finalize_on_close=True)  # as epath asks for it
    except ImportError as error:
        raise UserError("gs:// needs gcsfs: pip install gcsfs") from error


@functools.cache
def require_answer(bucket):
    """Refuses a bucket that cannot be reached, or not by this user."""
    found = []

    def ask():
        try:
            found.append(system().info(bucket))
        except Exception as error:  # of half a dozen libraries
            found.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    late = f"no answer in {PATIENCE:g} s{_heard.words}"
    answer = found[0] if found else TimeoutError(late)
    if isinstance(answer, UserError):
        raise answer
    if not isinstance(answer, dict):
        raise UserError(f"gs://{bucket}: {_reason(answer)}; {_remedy()}")


class _Heard(logging.Handler):
    """words: the last that gcsfs has logged, which says why it tries again."""

    words = ""

    def emit(self, record):
        self.words = f" ({record.getMessage().splitlines()[0][:150]})"


_heard = _Heard(logging.WARNING)


def fault(error):
    """An exception of talking to a bucket in one line; None of any other."""
    if f"{type(error).__module__}.".startswith(LIBRARIES):
        return f"Google Cloud Storage: {_reason(error)}; {_remedy()}"
    return None


def _reason(error):
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket, or it may not be seen"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _remedy():
    if host := os.environ.get("STORAGE_EMULATOR_HOST"):
        return f"STORAGE_EMULATOR_HOST={host} is where it was looked for"
    return "look at its name, the network and gcloud auth application-default login"
