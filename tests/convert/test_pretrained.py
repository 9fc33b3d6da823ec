"""Weights by name, from a server that stands in this process."""

import hashlib
import http.server
import subprocess
import sys
import threading

import numpy as np
import pytest
from helpers import ROOT

from sit_jax.convert import pretrained
from sit_jax.convert.open import WeightsRef
from sit_jax.convert.pretrained import PRETRAINED, PretrainedFile, fetch, find
from sit_jax.errors import UserError

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


@pytest.fixture
def plain(server, monkeypatch):
    """Sets the entry of a table whose one file is no file of the Hub."""

    def put(**known):
        file = PretrainedFile(f"{server.url}/models/x.pt", "MIT", "dit", **known)
        monkeypatch.setattr(pretrained, "PRETRAINED", {"x": file})

    return put


@pytest.mark.parametrize("name", ["sit-xl2-256", "inception"])
def test_fetch_without_network_says_what_to_put_where(name, cache, monkeypatch):
    nowhere = "http://127.0.0.1:9"
    entry = PRETRAINED[name]
    if name == "inception":
        entry = PretrainedFile(f"{nowhere}/models/x.pth", "Apache-2.0")
    monkeypatch.setitem(PRETRAINED, name, entry)
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    with pytest.raises(UserError, match=" was not loaded ") as caught:
        fetch(name)
    line = str(caught.value)
    assert line.startswith(entry.url) and "\n" not in line
    assert entry.url.startswith(nowhere)
    assert line.endswith(f"put it at {cache / entry.cache_path}")


def test_pretrained_table_has_sources_and_licences():
    names = "sit-xl2-256 dit-xl2-256 dit-xl2-512 mdt-xl2 mdtv2-xl2 sd-vae-ft-mse"
    assert {*names.split(), "sd-vae-ft-ema", "inception"} == set(PRETRAINED)
    paths = {entry.cache_path for entry in PRETRAINED.values()}
    assert len(paths) == len(PRETRAINED)
    for name, entry in PRETRAINED.items():
        assert entry.url.startswith("https://") and entry.licence
        assert name.split("-")[0] in (entry.family, "sd")
    assert "BY-NC" in PRETRAINED["dit-xl2-256"].licence
    assert PRETRAINED["sd-vae-ft-mse"].url == (
        "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main/"
        "diffusion_pytorch_model.safetensors"
    )


def test_fetch_loads_a_named_file_once_and_tells_its_licence(server, cache, capsys):
    path = fetch("sit-xl2-256")
    assert path == cache / "nyu-visionx" / "SiT-collections" / "SiT-XL-2-256.pt"
    assert path.read_bytes() == CONTENT
    where = "/nyu-visionx/SiT-collections/resolve/main/SiT-XL-2-256.pt"
    assert ("GET", where) in server.requests
    assert "licence MIT" in capsys.readouterr().err
    count = len(server.requests)
    assert fetch("sit-xl2-256") == path and len(server.requests) == count
    assert capsys.readouterr().err == ""


def test_fetch_loads_any_file_of_the_hub(server, cache):
    name = "hf:some.one/a_repo/folder/the file.pt"
    assert fetch(name) == cache / "some.one" / "a_repo" / "folder" / "the file.pt"
    path = "/some.one/a_repo/resolve/main/folder/the%20file.pt"
    assert ("GET", path) in server.requests


def test_fetch_goes_on_after_a_broken_connection(server, cache):
    server.drops = (100_000,)
    assert fetch("mdt-xl2").read_bytes() == CONTENT


def test_fetch_refuses_a_file_of_another_sha256(server, cache):
    server.etag = "1" * 64
    with pytest.raises(UserError, match=f"{SHA}, not 300000 of 1{{64}}; .* removed"):
        fetch("mdt-xl2")
    assert not (cache / PRETRAINED["mdt-xl2"].cache_path).exists()
    server.etag = "a4b8c1"  # a small file's is not a sha256 of it
    assert fetch("hf:a/b/config.json").read_bytes() == CONTENT


def test_fetch_loads_a_plain_url_of_its_sha256_alone(plain, server, cache):
    plain(sha256="0" * 64)
    with pytest.raises(UserError, match="x.pt was not loaded .*does not match"):
        fetch("x")
    assert not [path for path in cache.rglob("*") if path.is_file()]
    plain(sha256=SHA, size=len(CONTENT))
    server.requests.clear()
    assert fetch("x").read_bytes() == CONTENT
    assert [method for method, _ in server.requests] == ["GET"]


@pytest.mark.parametrize(
    "name", ["hf:", "hf:owner/repo", "hf:a//b", "hf:a/../b", "hf:a/b/..", "hf:a/b/c/"]
)
def test_fetch_refuses_what_is_no_name(name, cache):
    with pytest.raises(UserError, match="is not hf:owner/repo/file"):
        fetch(name)


def test_fetch_names_what_is_called_like_a_published_file(cache, tmp_path, monkeypatch):
    """A folder that port_weights.py made, or a clone of the Hub's repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mdtv2-xl2").mkdir()
    with pytest.raises(UserError, match="so; ./mdtv2-xl2 is what is here"):
        fetch("mdtv2-xl2")
    assert fetch("./mdtv2-xl2").samefile(tmp_path / "mdtv2-xl2")


def test_fetch_returns_a_path_as_it_is(tmp_path):
    assert fetch(tmp_path / "x.pt") == tmp_path / "x.pt" and find("x.pt") is None
    assert fetch("~/x.pt").is_absolute()


def test_fetch_refuses_a_cached_file_of_another_size(cache):
    path = cache / PRETRAINED["sd-vae-ft-mse"].cache_path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"12345")
    with pytest.raises(UserError, match="has 5 bytes, sd-vae-ft-mse has 334643276; re"):
        fetch("sd-vae-ft-mse")


def test_fetch_tells_what_the_server_refuses(server, cache, monkeypatch):
    monkeypatch.setattr(Handler, "do_HEAD", lambda self: self.send_error(404))
    with pytest.raises(UserError, match="mdt_xl2_v2_ckpt.pt was not loaded .*404"):
        fetch("mdtv2-xl2")


def test_weights_ref_opens_published_names(server, cache):
    with pytest.raises(UserError, match="mdt_xl2_v2_ckpt.pt is damaged"):
        WeightsRef("mdtv2-xl2").open()  # the server's bytes are no weights
    with pytest.raises(
        UserError, match="no weights at sit-xl2: .* by its name: sit-xl2-256,"
    ):
        WeightsRef("sit-xl2").open()


def test_import_of_pretrained_asks_nothing_of_the_network():
    program = (
        "import socket\n"
        "def refuse(*words): raise SystemExit('network at import')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import sit_jax.convert.pretrained\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
