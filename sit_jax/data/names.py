"""Many names, in one block of memory: a million paths take tens of megabytes."""

import hashlib
import os

import numpy as np


class Names:
    """A sequence of strings that is small and quick to pickle."""

    def __init__(self, names):
        words = [os.fsencode(name) for name in names]
        self._words = b"".join(words)
        self._ends = np.cumsum([0, *map(len, words)])

    def __len__(self):
        return len(self._ends) - 1

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return os.fsdecode(self._words[self._ends[i] : self._ends[i + 1]])

    def digest(self):
        """sha256 over all of them, in their order."""
        digest = hashlib.sha256(self._ends.astype("<i8").tobytes())
        digest.update(self._words)
        return digest.hexdigest()
