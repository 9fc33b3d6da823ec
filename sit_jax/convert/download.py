"""A file from the network, whole or not there; what broke off goes on where it was."""

import contextlib
import http.client
import json
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from sit_jax.errors import UserError
from sit_jax.files import parse_json, require_space
from sit_jax.files import sha256 as hash_file

CHUNK = 2**20  # bytes
PATIENCE = 30  # seconds without an answer


def download(url, path, size=None, sha256=None):
    """Makes the file at `path`, of so many bytes and this hash where they are known.

    Both are taken from the server where it tells them: the Hugging Face Hub gives the
    sha256 of every large file. Until it is whole the file is PATH.part; a server that
    can is asked only for what is missing of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with open(part, "ab") as file, _alone(file):
        if path.exists():  # by another process, while this one waited
            part.unlink(missing_ok=True)
            return
        told = _Told(part.with_name(f"{part.name}.json"), size, sha256)
        _fill(file, url, path, told)
        if told.sha256 and (found := hash_file(part)) != told.sha256:
            part.unlink()
            told.path.unlink()
            raise UserError(
                f"{url} is another file than expected: sha256 {found}, not "
                f"{told.sha256}; what was loaded is removed"
            )
        os.replace(part, path)
        told.path.unlink(missing_ok=True)


class _Told:
    """What is known of the whole file; beside the part, for the next attempt."""

    def __init__(self, path, size, sha256):
        self.path, self.version, self.size, self.sha256 = path, None, size, sha256
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = parse_json(path.read_text())
            self.version, self.size = known["version"], size or known["size"]
            self.sha256 = sha256 or known["sha256"]

    def hear(self, headers, linked, begin):
        """Takes in an answer's headers; begin: where its bytes belong in the file.

        -> bytes of the whole file by this answer, or None.
        """
        tag = headers.get("ETag") or "W/"
        # one that begins with W/ does not promise the same bytes
        self.version = headers.get("Last-Modified") if tag[:2] == "W/" else tag
        length = headers.get("Content-Length")
        whole = int(length) + begin if length else None
        self.size = self.size or whole
        if re.fullmatch('"?[0-9a-f]{64}"?', linked):
            self.sha256 = self.sha256 or linked.strip('"')
        known = ("version", "size", "sha256")
        self.path.write_text(json.dumps({name: getattr(self, name) for name in known}))
        return whole


def _fill(file, url, path, told):
    """Loads what is missing; again after an interruption, as long as that helps."""
    from tqdm import tqdm

    best, reason = -1, "the connection ended"
    settings = dict(unit="B", unit_scale=True, desc=path.name, disable=None)
    with tqdm(total=told.size, **settings) as bar:
        while (have := file.seek(0, os.SEEK_END)) != told.size:
            if have <= best:
                raise UserError(
                    f"{url} broke off after {have} of {told.size or '?'} bytes "
                    f"({reason}); the same command goes on from there"
                )
            best = have
            try:
                _receive(file, url, path, told, bar)
            except (OSError, http.client.HTTPException) as error:
                reason = str(error) or type(error).__name__


def _receive(file, url, path, told, bar):
    """One request, into the file as far as it comes."""
    have, headers = file.tell(), {"User-Agent": "sit_jax"}
    if have and told.version:
        headers |= {"Range": f"bytes={have}-", "If-Range": told.version}
    redirects = _Redirects()
    request = urllib.request.Request(url, headers=headers)
    with _answer(redirects, request, file, path) as answer:
        if answer.status != 206:  # all of it, from the beginning
            have = 0
            file.truncate(0)
        if answer.headers.get_content_type() == "text/html":
            raise UserError(
                f"{url} gave a web page instead of a file; {_by_hand(path)}"
            )
        whole = told.hear(answer.headers, redirects.linked, have)
        if whole not in (None, told.size):
            raise UserError(f"{url} has {whole} bytes, not {told.size}: another file")
        require_space(path, (told.size or 0) - have)
        bar.total, bar.n = told.size, have
        while chunk := answer.read(CHUNK):
            file.write(chunk)
            bar.update(len(chunk))
    told.size = told.size or file.tell()


def _answer(redirects, request, file, path):
    url = request.full_url
    try:
        opener = urllib.request.build_opener(redirects)
        return opener.open(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # there is less than is here already
            file.truncate(0)
            raise
        reason = f"{url} answers {error.code} {error.reason}"
    except (OSError, http.client.HTTPException) as error:
        host = urllib.parse.urlsplit(url).netloc
        reason = (
            f"no connection to {host} ({getattr(error, 'reason', error)}) for {url}"
        )
    raise UserError(f"{reason}; {_by_hand(path)}")


def _by_hand(path):
    return f"load it elsewhere and put it at {path}"


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps what the Hub says of a file before it sends one to where the file is."""

    linked = ""

    def redirect_request(self, request, file, code, message, headers, url):
        self.linked = headers.get("X-Linked-Etag") or self.linked
        return super().redirect_request(request, file, code, message, headers, url)


@contextlib.contextmanager
def _alone(file):
    """Waits until no other process is loading the same file."""
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX)
    yield
