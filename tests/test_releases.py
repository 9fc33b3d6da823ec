"""Weights by name, from a server that stands in this process."""

import hashlib
import http.server
import threading

import numpy as np
import pytest
import small
from conftest import ROOT

from sit_jax import releases
from sit_jax.download import download
from sit_jax.errors import UserError
from sit_jax.releases import RELEASES, Release, fetch, find
from sit_jax.weights import open_weights

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


def test_a_file_is_loaded_whole_and_nothing_else_is_left(server, tmp_path):
    download(f"{server.url}/x", tmp_path / "a" / "x.pt", len(CONTENT), SHA)
    assert (tmp_path / "a" / "x.pt").read_bytes() == CONTENT
    assert left(tmp_path) == ["x.pt"]


def test_a_broken_connection_goes_on_at_once(server, tmp_path):
    server.drops = (100_000, 50_000)
    download(f"{server.url}/x", tmp_path / "x.pt", sha256=SHA)
    assert (tmp_path / "x.pt").read_bytes() == CONTENT
    asked = [None, "bytes=100000-", "bytes=150000-"]
    assert [ranged for _, ranged in server.asked] == asked


def test_what_broke_off_goes_on_in_the_next_run(server, tmp_path):
    server.drops = (100_000, 0)
    with pytest.raises(UserError, match="broke off after 100000 of 300000.*goes on"):
        download(f"{server.url}/x", tmp_path / "x.pt", sha256=SHA)
    assert left(tmp_path) == ["x.pt.part", "x.pt.part.json"]
    download(f"{server.url}/x", tmp_path / "x.pt", sha256=SHA)
    assert (tmp_path / "x.pt").read_bytes() == CONTENT
    assert server.asked[-1][1] == "bytes=100000-"
    assert left(tmp_path) == ["x.pt"]


def test_a_file_that_changed_meanwhile_is_loaded_from_its_beginning(server, tmp_path):
    server.drops = (100_000, 0)
    with pytest.raises(UserError, match="broke off"):
        download(f"{server.url}/x", tmp_path / "x.pt")
    server.content, server.version = CONTENT[::-1], '"v2"'
    download(f"{server.url}/x", tmp_path / "x.pt")
    assert (tmp_path / "x.pt").read_bytes() == CONTENT[::-1]


def test_without_ranges_it_begins_again(server, tmp_path):
    server.ranges, server.drops = False, (100_000, 200_000)
    download(f"{server.url}/x", tmp_path / "x.pt", sha256=SHA)
    assert (tmp_path / "x.pt").read_bytes() == CONTENT
    server.drops = (100_000, 100_000)  # it never gets farther
    with pytest.raises(UserError, match="broke off after 100000 of 300000"):
        download(f"{server.url}/x", tmp_path / "y.pt")


def test_without_lengths_the_connection_tells_the_end(server, tmp_path):
    server.lengths = False
    download(f"{server.url}/x", tmp_path / "x.pt", sha256=SHA)
    assert (tmp_path / "x.pt").read_bytes() == CONTENT


def test_a_part_of_more_than_there_is_starts_anew(server, tmp_path):
    (tmp_path / "x.pt.part").write_bytes(CONTENT + b"more")
    (tmp_path / "x.pt.part.json").write_text(
        '{"version": "\\"v1\\"", "size": null, "sha256": null}'
    )
    with pytest.raises(UserError, match="broke off after 0 of"):
        download(f"{server.url}/x", tmp_path / "x.pt")
    download(f"{server.url}/x", tmp_path / "x.pt", sha256=SHA)
    assert (tmp_path / "x.pt").read_bytes() == CONTENT


def test_another_hash_or_size_than_published_is_refused(server, tmp_path):
    wrong = "0" * 64
    with pytest.raises(UserError, match=f"sha256 {SHA}, not {wrong}.*removed"):
        download(f"{server.url}/x", tmp_path / "x.pt", sha256=wrong)
    assert left(tmp_path) == []
    with pytest.raises(UserError, match="has 300000 bytes, not 7: another file"):
        download(f"{server.url}/x", tmp_path / "y.pt", size=7)
    assert not (tmp_path / "y.pt").exists()


def test_the_hubs_own_hash_is_checked(server, tmp_path):
    server.linked = f'"{SHA}"'
    download(f"{server.url}/x", tmp_path / "x.pt")
    assert server.asked[-1][0] == "/there/x"
    server.linked = f'"{"1" * 64}"'
    with pytest.raises(UserError, match=f"sha256 {SHA}, not 1111"):
        download(f"{server.url}/x", tmp_path / "y.pt")
    server.linked = '"a4b8c1"'  # a small file's is not a sha256 of it
    download(f"{server.url}/x", tmp_path / "z.json")


def test_a_web_page_is_no_file(server, tmp_path):
    server.kind = "text/html; charset=utf-8"
    with pytest.raises(UserError, match="a web page instead of a file; load it else"):
        download(f"{server.url}/x", tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_two_at_once_load_it_once(server, tmp_path):
    path = tmp_path / "x.pt"
    both = [
        threading.Thread(target=download, args=(f"{server.url}/x", path, None, SHA))
        for _ in range(2)
    ]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert path.read_bytes() == CONTENT and len(server.asked) == 1
    assert left(tmp_path) == ["x.pt"]


@pytest.mark.parametrize("name", sorted(RELEASES))
def test_without_a_network_one_line_says_what_to_put_where(name, cache, monkeypatch):
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as gone:
        nowhere = f"http://127.0.0.1:{gone.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", nowhere)
    monkeypatch.setattr(releases, "RELEASES", offline(nowhere))
    release = releases.RELEASES[name]
    with pytest.raises(UserError) as told:
        fetch(name)
    said = str(told.value)
    assert said.startswith("no connection to 127.0.0.1:") and "\n" not in said
    assert f"for {release.url}; " in said and release.url.startswith(nowhere)
    assert said.endswith(f"put it at {cache / release.place}")


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


def test_the_table_says_where_from_and_under_what():
    names = (
        "sit-xl2-256 dit-xl2-256 dit-xl2-512 mdt-xl2 mdtv2-xl2 sd-vae-ft-mse".split()
    )
    assert {*names, "sd-vae-ft-ema", "inception"} == set(RELEASES)
    assert len({release.place for release in RELEASES.values()}) == len(RELEASES)
    for name, release in RELEASES.items():
        assert release.url.startswith("https://") and release.licence
        assert name.split("-")[0] in (release.family, "sd")
    assert "BY-NC" in RELEASES["dit-xl2-256"].licence
    assert RELEASES["sd-vae-ft-mse"].url == (
        "https://huggingface.co/stabilityai/sd-vae-ft-mse/resolve/main/"
        "diffusion_pytorch_model.safetensors"
    )


def test_a_named_file_is_loaded_once_and_its_licence_told(
    server, cache, monkeypatch, capsys
):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    found = fetch("sit-xl2-256")
    assert found == cache / "nyu-visionx" / "SiT-collections" / "SiT-XL-2-256.pt"
    assert found.read_bytes() == CONTENT
    assert server.asked[0][0] == (
        "/nyu-visionx/SiT-collections/resolve/main/SiT-XL-2-256.pt"
    )
    assert "licence MIT" in capsys.readouterr().err
    assert fetch("sit-xl2-256") == found and len(server.asked) == 1
    assert capsys.readouterr().err == ""


def test_any_file_of_the_hub(server, cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
    name = "hf:some.one/a_repo/folder/the file.pt"
    assert fetch(name) == cache / "some.one" / "a_repo" / "folder" / "the file.pt"
    assert server.asked[0][0] == "/some.one/a_repo/resolve/main/folder/the%20file.pt"


@pytest.mark.parametrize(
    "name", ["hf:", "hf:owner/repo", "hf:a//b", "hf:a/../b", "hf:a/b/..", "hf:a/b/c/"]
)
def test_names_that_are_none_are_refused(name, cache):
    with pytest.raises(UserError, match="is not hf:owner/repo/file"):
        fetch(name)


def test_what_is_called_as_a_release_is_not_passed_by(cache, tmp_path, monkeypatch):
    """A folder that port_weights.py made, or a clone of the Hub's repository."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mdtv2-xl2").mkdir()
    with pytest.raises(UserError, match="so; ./mdtv2-xl2 is what is here"):
        fetch("mdtv2-xl2")
    assert fetch("./mdtv2-xl2").samefile(tmp_path / "mdtv2-xl2")


def test_a_path_stays_a_path(tmp_path):
    assert fetch(tmp_path / "x.pt") == tmp_path / "x.pt" and find("x.pt") is None
    assert fetch("~/x.pt").is_absolute()


def test_a_file_of_another_size_in_the_cache_is_named(cache):
    path = cache / RELEASES["sd-vae-ft-mse"].place
    path.parent.mkdir(parents=True)
    path.write_bytes(b"12345")
    with pytest.raises(UserError, match="has 5 bytes, sd-vae-ft-mse has 334643276; re"):
        fetch("sd-vae-ft-mse")


def test_what_the_server_refuses_is_told(server, cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    server.content = b""  # answered with an error
    with pytest.raises(UserError, match="answers 416|broke off after 0"):
        fetch("mdt-xl2")
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(404))
    with pytest.raises(UserError, match="mdt_xl2_v2_ckpt.pt answers 404 Not Found; "):
        fetch("mdtv2-xl2")


def test_weights_are_opened_by_name(server, cache, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    opened = open_weights("mdtv2-xl2", lambda path: path.name)
    assert opened == "mdt_xl2_v2_ckpt.pt"
    with pytest.raises(
        UserError, match="no weights at sit-xl2; names are sit-xl2-256,"
    ):
        open_weights("sit-xl2", None)


def test_nothing_is_asked_of_the_network_at_import():
    program = (
        "import socket\n"
        "def refuse(*words): raise SystemExit('network at import')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import sit_jax.releases, sit_jax.download\n"
    )
    done = small.script("-c", program)
    assert done.returncode == 0, done.stderr
    words = ("urllib.request", "http.client", "socket", "requests", "huggingface_hub")
    # nothing else could ask: hosts meet by sockets, and a lock tells the host's name
    known = {"download.py", "rendezvous.py", "greeting.py", "locks.py"}
    for path in ROOT.glob("sit_jax/**/*.py"):
        asks = any(f"import {word}" in path.read_text() for word in words)
        assert asks == (path.name in known), path
