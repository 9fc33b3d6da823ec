"""Processes that meet: who is missing, unlike or gone is named, and nobody hangs.

Most of it without JAX, in threads or in small programs; two real processes train in
tests/slow/test_processes.py.
"""

import io
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT
from meetings import alone, flags, free_port, together, unknown_host

from sit_jax import cluster, command, hosts, rendezvous
from sit_jax.errors import LATER, UserError
from sit_jax.numbered import Numbered
from sit_jax.party import Party


def test_the_longest_limit_is_one_that_the_kernel_takes():
    with socket.create_server(("", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        rendezvous.Peer(sock, hosts.LONGEST).close()


def test_values_reach_all_in_order():
    def run(party):
        first = party.exchange({"from": party.place.index})
        return first, [party.exchange(10 * turn) for turn in range(5)]

    first = [{"from": index} for index in range(4)]
    assert together(4, run) == [(first, [[10 * t] * 4 for t in range(5)])] * 4


def test_a_value_may_be_long():
    """As the rows of a likelihood of a whole data set are."""
    text = "x" * (rendezvous.MOST + 10)
    assert together(2, lambda party: party.exchange(text)) == [[text] * 2] * 2


def test_a_limit_is_for_what_begins_inside_it():
    """An exchange in time is enough; a block that goes on is not ended for it."""

    def run(party):
        with party.within(0.3, "come"):
            found = party.exchange(party.place.index)
            time.sleep(0.6)
        return found

    def slowly(party):
        with party.within(0.3, "come"):
            if party.place.index:
                ended.wait(5)
            return party.exchange(0)

    def leave(self, index, words, code):
        if words:
            said.append((index, words, code))
            ended.set()

    ended, said = threading.Event(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Party, "_is_gone", leave)
        assert together(2, run) == [[0, 1]] * 2
        assert not said
        together(2, slowly)
    assert said == [(0, "process 1 (host1) did not come within 0.3 s", 2)]


def test_a_missing_process_is_named_within_the_limit():
    said = alone(0, 3, 1.0, port := free_port())
    assert f"processes 1, 2 of 3 did not come to localhost:{port} within 1 s" in said
    assert "there were 0 (here); start it" in said and said.endswith("--join-timeout")
    said = alone(1, 2, 1.0, port := free_port())
    assert f"process 0 does not answer at localhost:{port} within 1 s (Conn" in said
    assert said.endswith(
        "refused); start it, open its port, or give a longer --join-timeout"
    )
    assert "unknown.invalid" in unknown_host()


def test_those_that_came_hear_who_is_missing():
    port, said = free_port(), {}

    def come(index):
        where = cluster.Place(f"localhost:{port}", 3, index)
        try:
            Party(where, {"host": f"host{index}"}, 1.5, 10.0, None)
        except UserError as error:
            said[index] = str(error)

    threads = [threading.Thread(target=come, args=(index,)) for index in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert "process 1 of 3 did not come" in said[0]
    assert "there were 0 (host0), 2 (host2)" in said[0] and said[2] == said[0]


def test_two_of_one_number_and_another_count_are_named():
    port, said = free_port(), []

    def come(index, count):
        where = cluster.Place(f"localhost:{port}", count, index)
        try:
            Party(where, {"host": f"h{index}"}, 3.0, 10.0, None)
        except UserError as error:
            said.append(str(error))

    for pair in ([(0, 3), (1, 3), (1, 3)], [(0, 2), (1, 4)]):
        threads = [threading.Thread(target=come, args=each) for each in pair]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert len(set(said)) == 1 and len(said) == len(pair), said
        port = free_port()
        if len(pair) == 3:
            assert (
                "two processes say that they are number 1: on h1 and on h1" in said[0]
            )
            said.clear()
    assert (
        "process 1 (h1) expects 4 processes, process 0 (h0) 2; give all one" in said[0]
    )


def test_strangers_at_the_port_are_not_heard():
    port = free_port()

    def knock():
        for text in (b"GET / HTTP/1.1\r\n\r\n", b'{"greeting": "sit_jax 0"}\n', b"\n"):
            while True:
                try:
                    with socket.create_connection(("localhost", port)) as sock:
                        sock.sendall(text)
                        break
                except ConnectionRefusedError:
                    time.sleep(0.01)

    stranger = threading.Thread(target=knock)
    stranger.start()
    found = []

    def come(index):
        where = cluster.Place(f"localhost:{port}", 2, index)
        if index:
            stranger.join()
        party = Party(where, {"host": "h"}, 10.0, 10.0, None)
        found.append(party.exchange(index))
        party.close()

    threads = [threading.Thread(target=come, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == [[0, 1]] * 2


PROGRAM = """
import os, sys, threading, time
from sit_jax import cluster
from sit_jax.numbered import Numbered
from sit_jax.party import Party
index, port, what = int(sys.argv[1]), sys.argv[2], sys.argv[3]
say = lambda name, words: print(f"{name}: {words}", flush=True)
party = Party(cluster.Place(f"localhost:{port}", 3, index), {"host": "h"}, 20, 9, say)
party.exchange(None)
if index == int(sys.argv[4]):
    if what == "words":
        party.end("no disk", 2)
    os._exit(9)
threading.Event().wait(30)  # as in a collective that never comes back
"""


@pytest.mark.parametrize("what", ["words", "silence"])
@pytest.mark.parametrize("victim", [0, 2])
def test_the_end_of_one_is_the_end_of_all(what, victim):
    """With the words and the code of the one that ended, or with that of a loss."""
    port, begun = free_port(), time.monotonic()
    words = lambda i: [sys.executable, "-c", PROGRAM, str(i), str(port), what]
    pipe = {"stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": os.environ}
    started = [
        subprocess.Popen([*words(index), str(victim)], **pipe) for index in range(3)
    ]
    for index, process in enumerate(started):
        said, _ = process.communicate(timeout=25)
        if index != victim:
            last = "no disk" if what == "words" else "None"
            assert said == f"process {victim} (h): {last}\n"
            assert process.returncode == (2 if what == "words" else LATER)
    assert time.monotonic() - begun < 25


@pytest.mark.parametrize("lacking", ["method", "module", "option"])
def test_without_jaxs_private_names_processes_tell_each_other(monkeypatch, lacking):
    """A later JAX may lack them; slow/test_many_processes.py has two real processes."""
    from jax._src import distributed

    if lacking == "method":
        kind = type(distributed.global_state)
        monkeypatch.delattr(kind, "initialize_preemption_sync_manager")
    elif lacking == "module":
        monkeypatch.setitem(sys.modules, "jax._src.distributed", None)
        monkeypatch.delattr(sys.modules["jax._src"], "distributed")
    else:
        monkeypatch.setattr(hosts, "PREEMPTION", "jax_no_such_option")
    assert not hosts.heed_stops()
    for answers in ([False, False], [False, True]):
        monkeypatch.setattr(hosts, "exchange", lambda mine, said=answers: said)
        assert hosts.stop_at(1, False) == any(answers)


def test_an_error_carries_the_number_of_its_process(monkeypatch, capsys):
    monkeypatch.setattr(hosts, "_place", None)  # both are put back afterwards
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    place = ("--coordinator", f"localhost:{free_port()}", "--processes", "4")

    def main():
        hosts.join(flags(*place, "--process", "3", "--join-timeout", "1"))

    with pytest.raises(SystemExit) as end:
        command.run(main)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("process 3 of 4: train.py: process 0 does not answer at ")
    assert said.count("\n") == 1


def test_every_line_is_numbered():
    stream = io.StringIO()
    numbered = Numbered(stream, "[1] ", of_first=False)
    print("a\nb", file=numbered)
    numbered.write("c")
    numbered.write("d\n")
    assert stream.getvalue() == "[1] a\n[1] b\n[1] cd\n" and not numbered.isatty()
