"""Loading a file whole over connections that break, change and lie."""

import threading

import file_server
import pytest
from file_server import CONTENT, SHA, left

from sit_jax.convert.download import download
from sit_jax.errors import UserError

server = file_server.server


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
