"""A cache while it is being made: its plan, one shard after the other, its end."""

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np

from sit_jax.data.shards import HEAD, ShardReader, ShardWriter, file_size
from sit_jax.data.tags import DONE, PLAN, read_json, read_tags, require_same
from sit_jax.errors import UserError
from sit_jax.files import atomic_write, local_path, require_space


def open_plan(path, tags):
    """Makes the folder of a cache, or checks that the one there is being made alike."""
    path = local_path(path)
    path.mkdir(parents=True, exist_ok=True)
    if (path / PLAN).exists():
        found = read_tags(read_json(path / PLAN), path)
        require_same(path, found, dataclasses.asdict(tags))
    elif odd := next((p for p in path.iterdir() if p.name[0] != "."), None):
        raise UserError(f"{path} holds {odd.name} and no cache; take another folder")
    else:
        with atomic_write(path / PLAN) as name:
            name.write_text(json.dumps(dataclasses.asdict(tags), indent=1))
    return path


def missing(path, tags, process, count):
    """-> numbers of the shards that process `process` of `count` has yet to write."""
    if not 0 <= process < count:
        raise UserError(f"process {process} of {count}: they count from 0")
    numbers = _absent(path, tags, process, count)
    for k in numbers:
        for left in path.glob(f".{Path(tags.shard(k)[0]).stem}.*"):
            left.unlink()  # of one that was killed
    require_space(path / DONE, needed(path, tags, process, count))
    return numbers


def needed(path, tags, process, count):
    """Bytes of the shards that are missing."""
    record = np.dtype(tags.dtype).itemsize * int(np.prod(tags.shape)) + HEAD.size
    counts = (len(tags.shard(k)[1]) for k in _absent(path, tags, process, count))
    return sum(file_size(tags.views * images, record) for images in counts)


def _absent(path, tags, process, count):
    mine = range(process, tags.shards, count)
    return [k for k in mine if not (path / tags.shard(k)[0]).exists()]


@contextlib.contextmanager
def shard(path, tags, number):
    """-> Shard, whose file appears when it is whole."""
    with atomic_write(path / tags.shard(number)[0]) as name:
        filled = Shard(ShardWriter(name), tags)
        yield filled
        filled.close()


class Shard:
    """One shard being written, and what its last record will say."""

    def __init__(self, writer, tags):
        self._writer, self._tags, self._images, self._broken = writer, tags, 0, {}
        self._sums = [_sums(np.zeros((0, *tags.shape)), tags)]

    def add(self, ids, labels, views, broken=()):
        """views: arrays [N, *tags.shape], one or two; broken: {id: why}, left out."""
        views = np.stack(views, 1)
        for i, label, pair in zip(ids, labels, views, strict=True):
            self._writer.add(int(i), int(label), pair)
        self._images += len(views)
        self._broken |= dict(broken)
        self._sums.append(_sums(views.reshape(-1, *self._tags.shape), self._tags))

    def close(self):
        count, first, second = (sum(part) for part in zip(*self._sums, strict=True))
        what = {"images": self._images, "broken": self._broken}
        what["sums"] = [count, first.tolist(), second.tolist()]
        self._writer.close(what)


def finish(path, tags, class_names):
    """Writes cache.json if all shards are there. -> what it says, or None."""
    names = [tags.shard(number)[0] for number in range(tags.shards)]
    if not all((path / name).exists() for name in names):
        return None
    each = [ShardReader(path / name).what() for name in names]
    scale = tags.scale if tags.kind == "moments" and tags.scale else 1.0
    about = {
        "tags": dataclasses.asdict(tags),
        "images": [what["images"] for what in each],
        "broken": {i: why for what in each for i, why in what["broken"].items()},
        "latents": _statistics([what["sums"] for what in each], scale),
        "class_names": list(class_names),
    }
    with atomic_write(path / DONE) as name:
        name.write_text(json.dumps(about, indent=1))
    return about


def _sums(moments, tags):
    """moments [N, h, w, C or 2C] -> [count, sums of x, of x^2], x a drawn latent.

    Expected values over the draw: of mean + std * noise they need no noise. By channel.
    """
    x = np.asarray(moments, np.float32)
    x = np.ascontiguousarray(x.reshape(-1, x.shape[-1]).T)  # long rows add up fast
    mean, log_var = np.split(x, 2) if tags.kind == "moments" else (x, None)
    total = lambda rows: rows.sum(1, dtype=np.float64)
    second = total(np.square(mean))
    if log_var is not None:  # else the latents have been drawn
        second += total(np.exp(np.clip(log_var, -30, 20)))
    return [mean.shape[1], total(mean), second]


def _statistics(sums, scale):
    """Mean and standard deviation of scaled latents, for each channel."""
    count, first, second = (np.sum(part, 0) for part in zip(*sums, strict=True))
    mean = first / max(count, 1)
    std = np.sqrt(np.maximum(second / max(count, 1) - mean**2, 0))
    return {"mean": (scale * mean).tolist(), "std": (scale * std).tolist()}
