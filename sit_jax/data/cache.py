"""Latents made beforehand: shards of moments, and tags that say how they were made.

A cache is a folder of moments-*-of-*.array_record. plan.json has the tags and is there
from the start; cache.json, with the counts, is written when all shards are there.
"""

import bisect
import functools
import itertools

import numpy as np

from sit_jax.data.shards import ShardReader, unpack
from sit_jax.data.tags import DONE, PLAN, read_json, read_tags, require_same
from sit_jax.errors import UserError
from sit_jax.files import local_path


class LatentCache:
    """Moments (or latents) from a cache; where it has both flips, batches take both."""

    def __init__(self, path: str, flip: bool = True):
        self.path = local_path(path)
        self.about = _about(self.path)
        self.tags = tags = read_tags(self.about["tags"], self.path)
        if flip and tags.views < 2 and tags.kind == "moments":
            raise UserError(
                f"{self.path} was extracted without flips; set flip=False "
                "(--config.source.flip=False), or extract it again without --no-flip"
            )
        self.flip = flip and tags.views == 2
        self.shape, self.classes = tuple(tags.shape), tags.classes
        self.class_names = self.about["class_names"]
        counts = self.about["images"]
        self._starts = list(itertools.accumulate(counts, initial=0))
        names = (tags.shard(number)[0] for number in range(tags.shards))
        self._shards = [ShardReader(self.path / name) for name in names]
        self._dtype = np.dtype(tags.dtype).newbyteorder("<")

    def __len__(self):
        return self._starts[-1]

    def __getitem__(self, i):
        return self._record(i, 0)

    def mirrored(self, i):
        """Record i, made from the mirrored image."""
        return self._record(i, 1)

    def id(self, i):
        """The number of image i in the source; others only if some were broken."""
        return unpack(self._read(i, 0), self.shape, self._dtype)[0]

    def _record(self, i, view):
        _, label, array = unpack(self._read(i, view), self.shape, self._dtype)
        return {self.tags.kind: _single(array), "label": np.int32(label)}

    def _read(self, i, view):
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = bisect.bisect_right(self._starts, i) - 1
        number = (i - self._starts[shard]) * self.tags.views + view
        return self._shards[shard].read(number)


def check_cache(source, codec, shape):
    """Refuses a cache made otherwise than a config wants: its codec, its data's shape.

    A source without tags passes, and so does what one of the two does not know.
    """
    tags = getattr(source, "tags", None)
    if tags is None:
        return
    depth = tags.shape[-1] // (2 if tags.kind == "moments" else 1)
    found = (*tags.shape[:2], depth)
    if found != tuple(shape):
        size = f", from images of {tags.size} pixels" if tags.size else ""
        raise UserError(
            f"{source.path} holds latents {found}{size}, the config's shape is "
            f"{tuple(shape)}; extract with another --size, or set the shape"
        )
    wanted = {name: getattr(codec, name, None) for name in ("scale", "encoder_sha256")}
    wanted = {name: value for name, value in wanted.items() if value is not None}
    remedy = "name the VAE that it was made with (--config.vae), or extract it again"
    require_same(source.path, tags, wanted, remedy)


def about_data(source, codec):
    """-> what a checkpoint says of its data: the latents' encoder, the classes' names.

    Only what is known of it.
    """
    tags = getattr(source, "tags", codec)
    names = getattr(source, "class_names", None)
    found = {
        "encoder_sha256": getattr(tags, "encoder_sha256", None),
        "class_names": names and list(names),
    }
    return {name: value for name, value in found.items() if value is not None}


def _single(array):
    """float32 of float32, or of float16: exact, by a table, in half of numpy's time."""
    if array.dtype.itemsize == 4:
        return array.astype(np.float32, copy=False)
    return _singles().take(array.view("<u2"))


@functools.cache
def _singles():
    return np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _about(path):
    """What cache.json says of a finished cache."""
    if (path / DONE).exists():
        return read_json(path / DONE)
    if (path / PLAN).exists():
        raise UserError(f"{path} is not finished; run extract_features.py again")
    raise UserError(f"no {DONE} in {path}; extract_features.py makes caches")
