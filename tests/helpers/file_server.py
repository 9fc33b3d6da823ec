"""A server of one file in this process, as the Hugging Face Hub serves one."""

import hashlib
import http.server
import threading

import numpy as np
import pytest

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """One file at every path; each field changes how it is served."""

    content = CONTENT
    etag = SHA  # which of large files the Hub says is the sha256
    drops = ()  # after so many bytes of the answer, one for each request

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []  # (method, path)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(b"")

    def do_GET(self):
        body = self.server.content
        if wanted := self.headers.get("Range"):
            body = body[int(wanted.removeprefix("bytes=").partition("-")[0]) :]
        if self.server.drops:
            self.answer(body[: self.server.drops[0]], len(body))
            self.server.drops = self.server.drops[1:]
        else:
            self.answer(body)

    def answer(self, body, length=None):
        self.server.requests.append((self.command, self.path))
        is_part = self.headers.get("Range") and self.command == "GET"
        self.send_response(206 if is_part else 200)
        size = len(self.server.content) if self.command == "HEAD" else len(body)
        self.send_header("Content-Length", length or size)
        self.send_header("ETag", f'"{self.server.etag}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words):
        pass


@pytest.fixture
def server(monkeypatch):
    with Server() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SIT_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
