"""A folder of this machine whose files are sent to a bucket as they change.

For logs: they are appended to, and whoever writes them wants files.
"""

import contextlib
import shutil
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path

from sit_jax import places
from sit_jax.interrupts import made
from sit_jax.places import in_bucket

SENT = 30.0  # seconds from one look for changes to the next


@contextlib.contextmanager
def mirrored(folder, begun=(), besides=()):
    """Gives a Mirror: of a folder in a bucket a local one, of a local one itself.

    begun: names of files that go on as they are there. besides: folders that stay here.
    """
    if not in_bucket(folder):
        yield Mirror(folder)
        return
    make = lambda: Path(tempfile.mkdtemp(prefix="sit_jax."))
    with made(make, partial(shutil.rmtree, ignore_errors=True)) as here:
        mirror = Mirror(here, folder, besides)
        for file in begun:
            if (folder / file).exists():
                places.bring(folder / file, mirror.here / file)
        ended = threading.Event()
        sending = threading.Thread(target=mirror.run, args=(ended,), daemon=True)
        sending.start()
        try:
            yield mirror
        finally:
            ended.set()
            sending.join()
            mirror.send()


class Mirror:
    """here: the folder to write to; there: the place it is sent to, if any."""

    def __init__(self, here, there=None, besides=()):
        self.here, self._there, self._besides = here, there, besides
        self._lock, self._sent = threading.Lock(), {}

    def send(self):
        """Sends what has changed since it was sent."""
        with self._lock:
            for name in places.files(self.here) if self._there else ():
                version = places.version(self.here / name)
                stays = name.split("/")[0] in self._besides or name.endswith(".part")
                if not stays and self._sent.get(name) != version:
                    places.send(self.here / name, self._there / name)
                    self._sent[name] = version

    def run(self, ended):
        while not ended.wait(SENT):
            try:
                self.send()
            except Exception as error:  # the network; it is sent again
                words = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"WARNING: {self._there} lags ({words})", file=sys.stderr)
