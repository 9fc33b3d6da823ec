"""A server of one file in this process, that breaks off and lies as it is told."""

import hashlib
import http.server
import threading

import numpy as np
import pytest

from sit_jax.convert import releases
from sit_jax.convert.releases import RELEASES, Release

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """One file at every path; each field changes how it is served."""

    content, version = CONTENT, '"v1"'
    ranges = True  # does it give parts
    drops = ()  # after so many bytes of the answer, one for each request
    lengths = True  # does it say how long the file is
    kind = "application/octet-stream"
    status = 200
    linked = None  # the Hub's header, in a redirect to /there/...

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []  # (path, Range header)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, headers = self.server, self.headers
        server.asked.append((self.path, headers.get("Range")))
        if server.linked and not self.path.startswith("/there"):
            self.send_response(302)
            self.send_header("Location", f"/there{self.path}")
            self.send_header("X-Linked-Etag", server.linked)
            self.end_headers()
            return
        first = self._first() if server.ranges else 0
        if first >= len(server.content):
            self.send_error(416)
            return
        body = server.content[first:]
        status = 206 if first else server.status
        self.send_response(status)
        self.send_header("Content-Type", server.kind)
        self.send_header("ETag", server.version)
        if server.lengths:
            self.send_header("Content-Length", len(body))
        if first:
            end = len(server.content)
            self.send_header("Content-Range", f"bytes {first}-{end - 1}/{end}")
        self.end_headers()
        if server.drops:
            body, server.drops = body[: server.drops[0]], server.drops[1:]
        self.wfile.write(body)

    def _first(self):
        wanted, condition = self.headers.get("Range"), self.headers.get("If-Range")
        if wanted is None or condition != self.server.version:
            return 0
        return int(wanted.removeprefix("bytes=").removesuffix("-"))

    def log_message(self, *words):
        pass


@pytest.fixture
def server():
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def offline(nowhere):
    """The table, with its other servers away too."""

    def at(source):
        for server in (releases.DIT, releases.FID):
            source = source.replace(server, f"{nowhere}/models")
        return source

    return {
        name: Release(at(r.source), r.licence, size=r.size)
        for name, r in RELEASES.items()
    }
