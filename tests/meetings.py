"""Processes that meet, as threads of one, and their flags."""

import argparse
import socket
import threading
import time

import pytest

from sit_jax import cluster, hosts
from sit_jax.errors import UserError
from sit_jax.party import Party


def free_port():
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def flags(*words):
    parser = argparse.ArgumentParser()
    hosts.add_flags(parser)
    return parser.parse_args(words)


def place(*words, environ=None):
    return cluster.place(flags(*words), 1, environ or {})


def together(count, run, seconds=5.0):
    """run(party) in a thread for each of `count` processes -> what they give or say."""
    port, found = free_port(), [None] * count

    def one(index):
        try:
            where = cluster.Place(f"localhost:{port}", count, index)
            hello = {"host": f"host{index}"}
            party = Party(where, hello, seconds, 10.0, lambda *words: None)
            found[index] = run(party)
            party.close()
        except UserError as error:
            found[index] = str(error)

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return found


def alone(index, count, seconds, port):
    where = cluster.Place(f"localhost:{port}", count, index)
    begun = time.monotonic()
    with pytest.raises(UserError) as refused:
        Party(where, {"host": "here"}, seconds, 10.0, None)
    assert time.monotonic() - begun < seconds + 2
    return str(refused.value)


def unknown_host():
    where = cluster.Place("unknown.invalid:9", 2, 1)
    with pytest.raises(UserError) as refused:
        Party(where, {"host": "here"}, 1.0, 10.0, None)
    return str(refused.value)
