"""Weights by name, from a server that stands in this process."""

import http.server

import file_server
import pytest
import small
from conftest import ROOT
from file_server import CONTENT, Handler, offline

from sit_jax.convert import releases
from sit_jax.convert.releases import RELEASES, fetch, find
from sit_jax.convert.weights import open_weights
from sit_jax.errors import UserError

cache = file_server.cache
server = file_server.server


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
        UserError, match="no weights at sit-xl2: .* by its name: sit-xl2-256,"
    ):
        open_weights("sit-xl2", None)


def test_nothing_is_asked_of_the_network_at_import():
    program = (
        "import socket\n"
        "def refuse(*words): raise SystemExit('network at import')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "import sit_jax.convert.releases, sit_jax.convert.download\n"
    )
    done = small.script("-c", program)
    assert done.returncode == 0, done.stderr
    words = ("urllib.request", "http.client", "socket", "requests", "huggingface_hub")
    # nothing else could ask: hosts meet by sockets, and a lock tells the host's name
    known = {"download.py", "rendezvous.py", "greeting.py", "files.py"}
    for path in ROOT.glob("sit_jax/**/*.py"):
        asks = any(f"import {word}" in path.read_text() for word in words)
        assert asks == (path.name in known), path
