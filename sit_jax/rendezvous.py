"""A connection from every process to process 0, from its start to its end.

jax.distributed lets nobody speak before all have registered, and ends the processes
without a name when one does not. So before it begins, process 0 listens at the same
address and hears who is there; the connections stay, and the end of one is the end of
a process, at once. What is said is JSON, one object a line.
"""

import contextlib
import json
import socket
import threading
import time

from sit_jax.errors import UserError

GREETING = "sit_jax 1"  # others that try a port, and other versions, are not heard
MOST = 2**20  # bytes of a first line, which may be a stranger's
GREETED = 5  # seconds that a new connection may take to say who it is
UNMET = "start it, open its port, or give a longer --join-timeout"
RETRY = 0.2  # seconds between two attempts to connect


class Peer:
    """One connection: whole JSON lines, from one thread, to any."""

    def __init__(self, sock, silence):
        _keep_alive(sock, silence)
        sock.settimeout(None)
        self._sock, self._file = sock, sock.makefile("rb")
        self._lock = threading.Lock()

    def send(self, **message):
        """A peer that is gone is noticed by whoever reads from it."""
        data = (json.dumps(message) + "\n").encode()
        with self._lock, contextlib.suppress(OSError):
            self._sock.sendall(data)

    def read(self, seconds=None, most=-1):
        """-> the next message, or None at the end, or if it takes or is more."""
        try:
            self._sock.settimeout(seconds)
            text = self._file.readline(most)
            self._sock.settimeout(None)
            return json.loads(text) if text.endswith(b"\n") else None
        except (OSError, ValueError):
            return None

    def close(self):
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # ends a read in another thread
        self._file.close()
        self._sock.close()


def listen(place, hello, seconds, silence):
    """Process 0 waits for all others -> {index: Peer}, {index: hello}.

    Raises UserError for those that have not come after `seconds`. Whatever is wrong is
    told to all that have come.
    """
    peers, hellos, until = {}, {0: hello}, time.monotonic() + seconds
    try:
        with _server(place) as server:
            while len(hellos) < place.count:
                server.settimeout(max(until - time.monotonic(), 0.01))
                try:
                    sock, address = server.accept()
                except TimeoutError:
                    raise UserError(_missing(place, hellos, seconds)) from None
                _admit(place, Peer(sock, silence), address, peers, hellos)
    except UserError as error:
        for peer in peers.values():
            peer.send(end=str(error), code=2, of=0)
            peer.close()
        raise
    return peers, hellos


def connect(place, hello, seconds, silence):
    """Another process reaches process 0 -> Peer; the answer comes by read()."""
    until, reason = time.monotonic() + seconds, "nothing"
    while (left := until - time.monotonic()) > 0:
        try:
            sock = socket.create_connection((place.host, place.port), timeout=left)
        except OSError as error:
            reason = error.strerror or str(error)
            time.sleep(min(RETRY, left))
            continue
        peer = Peer(sock, silence)
        peer.send(greeting=GREETING, index=place.index, count=place.count, hello=hello)
        return peer
    raise UserError(
        f"process 0 does not answer at {place.address} within {seconds:g} s ({reason})"
        f"; {UNMET}"
    )


def _server(place):
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(
            ("", place.port), family=family, dualstack_ipv6=dual, backlog=1024
        )
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen at port {place.port} ({error.strerror}); name "
            "another one in --coordinator"
        ) from error


def _admit(place, peer, address, peers, hellos):
    """Takes a process in; one that is no process of ours is sent away unheard."""
    first = peer.read(GREETED, MOST)
    if not isinstance(first, dict) or first.get("greeting") != GREETING:
        peer.close()
        return
    index, hello = first["index"], first["hello"]
    if first["count"] != place.count:
        peers[-1] = peer  # it hears of it too
        raise UserError(
            f"process {index} ({hello['host']}) expects {first['count']} processes, "
            f"process 0 ({hellos[0]['host']}) {place.count}; give all one --processes"
        )
    if index in hellos:
        peers[-1] = peer
        raise UserError(
            f"two processes say that they are number {index}: on "
            f"{hellos[index]['host']} and on {hello['host']}; each needs its "
            "own --process"
        )
    peers[index], hellos[index] = peer, hello


def _missing(place, hellos, seconds):
    absent = [index for index in range(place.count) if index not in hellos]
    named = ", ".join(map(str, absent[:8])) + (", ..." if len(absent) > 8 else "")
    word = "process" if len(absent) == 1 else "processes"
    here = ", ".join(f"{i} ({hellos[i]['host']})" for i in sorted(hellos)[:8])
    return (
        f"{word} {named} of {place.count} did not come to {place.address} within "
        f"{seconds:g} s; there were {here}; {UNMET}"
    )


def _keep_alive(sock, silence):
    """Lets the kernel notice, within `silence` seconds, a host that says nothing."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    each = max(int(silence / 4), 1)
    options = {"TCP_KEEPIDLE": each, "TCP_KEEPINTVL": each, "TCP_KEEPCNT": 3}
    options["TCP_USER_TIMEOUT"] = int(1000 * silence)
    for name, value in options.items():
        if hasattr(socket, name):  # not on every system
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
