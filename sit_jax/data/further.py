"""Classes numbered after those that a network knows already."""

import numpy as np

from sit_jax.errors import UserError


class Further:
    """Another source's records, class c of them being class `after` + c here.

    For new classes by LoRA: a base of 1,000 classes and a folder of 3 give 1,003, of
    which the data shows the last 3. What else the source can do, this one can.
    """

    def __init__(self, source, after: int = 1000):
        if after < 0:
            raise UserError(f"source.after is {after}; it must be at least 0")
        self._source, self._after = source, after
        self.classes = after + source.classes

    def __len__(self):
        return len(self._source)

    def __getitem__(self, i):
        return self._numbered(self._source[i])

    def mirrored(self, i):
        """Record i, seen in a mirror."""
        return self._numbered(self._source.mirrored(i))

    def __getattr__(self, name):
        if name.startswith("_"):  # before there is a source, in unpickling
            raise AttributeError(name)
        return getattr(self._source, name)

    def _numbered(self, record):
        return {**record, "label": np.int32(record["label"] + self._after)}
