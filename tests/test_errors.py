"""What exceptions become: a line, and a code that says whether to try again."""

import errno
import os

import pytest
from sit_jax.checkpoint.handling import plainly

from sit_jax import command
from sit_jax.errors import LATER, MISTAKE, code_of


def of(number):
    return OSError(number, os.strerror(number), "x")


def like(name, base=Exception, **fields):
    """An exception as a library of buckets would raise it, which is not installed."""
    kind = type(name, (base,), {"__module__": fields.pop("__module__", "x")})
    error = kind()
    vars(error).update(fields)
    return error


@pytest.mark.parametrize(
    "error, code",
    [
        (of(errno.ESTALE), LATER),  # NFS, whose server has begun anew
        (of(errno.ECONNRESET), LATER),
        (TimeoutError("slow"), LATER),
        (
            like("ServerDisconnectedError", like("ClientConnectionError").__class__),
            LATER,
        ),
        (like("TransportError"), LATER),
        (like("HttpError", code=503), LATER),
        (like("HttpError", code=429), LATER),
        (like("HttpError", code=403), MISTAKE),
        (of(errno.ENOSPC), MISTAKE),
        (of(errno.EACCES), MISTAKE),
        (None, MISTAKE),
        (of(errno.EPIPE), MISTAKE),  # of a reader of our output, not of the network
    ],
    ids=str,
)
def test_the_networks_faults_may_pass_and_others_would_come_again(error, code):
    assert code_of(error) == code


@pytest.mark.parametrize(
    "error",
    [
        of(errno.ESTALE),
        like("HttpError", code=503, __module__="gcsfs.retry"),
        ValueError("writing x: Stale file handle [os_error_code='116']"),
    ],
    ids=["orbax", "bucket", "tensorstore"],
)
def test_a_save_that_the_network_spoils_may_be_tried_again(tmp_path, error, capsys):
    def main(error=error):
        with plainly(tmp_path):
            raise error

    with pytest.raises(SystemExit) as end:
        command.run(main)
    assert end.value.code == LATER
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_ends_with_that_code_and_never_without_words(capsys):
    for error, code, said in (
        (of(errno.ESTALE), LATER, "x: Stale file handle"),
        (like("ProxyError", OSError), LATER, "ProxyError"),
        (of(errno.ENOSPC), MISTAKE, "x: No space left on device"),
    ):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit) as end:
            command.run(main)
        assert end.value.code == code
        assert capsys.readouterr().err.endswith(f": {said}\n")
