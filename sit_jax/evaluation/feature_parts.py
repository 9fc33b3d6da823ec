"""Features that a network makes of images, kept on disk batch by batch.

A killed evaluation goes on behind the last batch. What is added up from them is the
same to the bit: a batch comes back from the disk as it was made.
"""

import hashlib
import json

from sit_jax.files import require_space
from sit_jax.manifest import environment
from sit_jax.parallel import multihost
from sit_jax.sampling.parts import Parts, parts_size

FLOAT = 4  # bytes
RUN = ("packages", "platform", "device", "devices")  # what can change a feature's bits


class FeatureParts:
    """Those of an evaluated.OfImages by an extractor, beside `out` until remove().

    Only process 0 has them. writes: what the run will write, see Parts.
    """

    def __init__(self, source, extractor, out, writes=()):
        self._source, self._extractor, self._out = source, extractor, out
        self.count = -(-source.count // extractor.batch_size)
        self._parts, todo = None, None
        if multihost.is_primary():
            digest = _digest(source, extractor)
            self._parts = Parts(out, digest, overwrite=True, writes=writes)
            todo = self._parts.checked(self.count)
            require_space(out, self._needed())
        self.todo = multihost.broadcast(todo)

    def __iter__(self):
        """Yields the features of every batch, of those that are there from the disk."""
        made = self._source.features(self._extractor, self.todo)
        missing = set(self.todo)
        for batch in range(self.count):
            if batch not in missing:
                yield self._parts.read(batch)
                continue
            features = next(made)
            self._parts.save(batch, features)
            yield features

    def tell(self, name):
        """Says how much is there already of what is called so."""
        if done := self.count - len(self.todo):
            print(f"{done} of {self.count} batches of {name} are there", flush=True)

    def compute(self):
        """The part of the other processes: they have a share in every batch."""
        for _ in self._source.features(self._extractor, self.todo):
            pass

    def _needed(self):
        widths = self._source.widths(self._extractor).values()
        size = self._source.count * sum(widths) * FLOAT
        return max(0, size - parts_size(self._out))


def _digest(source, extractor):
    """Of everything that decides the features and how they are shared out."""
    run = environment()
    said = {
        "images": [source.count, source.images.identity],
        "pipeline": extractor.pipeline,
        "batch_size": extractor.batch_size,
        **{name: run[name] for name in RUN},
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
