"""Images to moments: decoded, encoded on all devices, written in shards.

What a shard holds follows from its number, the source and the codec: processes only
share out the numbers, and one that was killed begins again at the shard it was in.
"""

import collections
import contextlib
import itertools
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.data.filling import finish, missing, open_plan, shard
from sit_jax.data.images import CROP
from sit_jax.data.reading import Broken, read_with_gaps
from sit_jax.data.tags import PLAN, Tags, default_shards
from sit_jax.data.workers import Workers
from sit_jax.errors import UserError
from sit_jax.files import local_path
from sit_jax.parallel import multihost
from sit_jax.parallel.mesh import BATCH, batch_sharding, make_mesh, replicated

MOST = 1024  # shards of a cache
DTYPES = ("float32", "float16")


class Batch(NamedTuple):
    """Some images of one shard, on their way through the encoder."""

    shard: int
    ids: range
    labels: Any  # int32 [B], -1 for a broken image
    broken: dict  # id: why
    views: Any  # arrays [B, h, w, 2C]: as it is, and in the mirror


def describe(source, codec, dtype="float32", flip=True, shards=None):
    """-> Tags of the cache that this source and codec give."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    shards = default_shards(len(source)) if shards is None else shards
    if not 1 <= shards <= min(MOST, len(source)):
        raise UserError(
            f"{shards} shards for {len(source)} images: each needs one, and more than "
            f"{MOST} are too many files"
        )
    one = jax.ShapeDtypeStruct((1, *source.shape), np.uint8)
    return Tags(
        kind="moments",
        shape=jax.eval_shape(lambda codec, x: codec.encode(x), codec, one).shape[1:],
        dtype=dtype,
        views=1 + bool(flip),
        encoder_sha256=getattr(codec, "encoder_sha256", None),
        precision=getattr(getattr(codec, "precision", None), "word", None),
        scale=getattr(codec, "scale", None),
        size=source.shape[0],
        crop=CROP,
        listing_sha256=source.listing(),
        records=len(source),
        classes=source.classes,
        shards=shards,
    )


def extract(
    source,
    codec,
    out,
    tags,
    batch_size=64,
    process=0,
    count=1,
    threads=4,
    workers=0,
    show=lambda images, of: None,
    say=print,
):
    """Writes this process's shards into the folder `out`. -> (images, cache.json).

    Process `process` of `count` takes every count-th shard. cache.json is None as long
    as other processes' shards are missing. show(images, of) hears of every batch.
    """
    # processes that never meet have a lock each: only none may be there twice
    name = (
        "lock" if count == multihost.process_count() else f"lock.{process}-of-{count}"
    )
    with multihost.lock(local_path(out), name):
        return _extracted(
            source,
            codec,
            out,
            tags,
            batch_size,
            process,
            count,
            threads,
            workers,
            show,
            say,
        )


def _extracted(
    source, codec, out, tags, batch_size, process, count, threads, workers, show, say
):
    path = _planned(out, tags)
    numbers = missing(path, tags, process, count)
    total = sum(len(tags.shard(k)[1]) for k in numbers)
    broken, encoder = Broken(source, say), Encoder(codec, tags, batch_size)
    batches = _batches(source, encoder, tags, numbers, threads, workers)
    if total:
        show(0, total)  # a bar that begins with the first batch would think it fast
    with contextlib.closing(batches):
        for number, some in itertools.groupby(batches, lambda batch: batch.shard):
            with shard(path, tags, number) as filled:
                for batch in some:
                    broken.add(batch.broken, "it is left out")
                    filled.add(*_whole(batch, source), batch.broken)
                    show(len(batch.ids), total)
    multihost.barrier()
    about = finish(path, tags, source.class_names) if multihost.is_primary() else None
    if multihost.process_count() > 1 and multihost.is_primary() and about is None:
        raise UserError(
            f"{path} lacks shards that other processes have written; it must be on a "
            "file system that all hosts share"
        )
    return total, multihost.broadcast(about)


def _planned(out, tags):
    """-> the folder of the cache, which process 0 makes and the others see."""
    path = local_path(out)
    if multihost.is_primary():
        open_plan(out, tags)
    multihost.assert_shared(path / PLAN)
    return open_plan(out, tags)


def _whole(batch, source):
    """-> ids, labels, views of the images of a batch that are not broken."""
    whole = np.flatnonzero(batch.labels >= 0)
    ids, views = np.array(batch.ids)[whole], [np.asarray(v)[whole] for v in batch.views]
    for view in views:
        finite = np.isfinite(view).all((1, 2, 3))
        if not finite.all():
            name = source.name(int(ids[~finite][0]))
            raise UserError(
                f"the moments of {name} are not finite; is it the right VAE?"
            )
    return ids, batch.labels[whole], views


class Encoder:
    """codec.encode, compiled once for batches of one size over the local devices."""

    def __init__(self, codec, tags, batch_size):
        mesh = make_mesh(data=-1, fsdp=1, devices=jax.local_devices())
        parts = int(np.prod([mesh.shape[axis] for axis in BATCH]))
        if batch_size < 1 or batch_size % parts:
            raise UserError(
                f"batch size {batch_size} cannot be split over {parts} devices; "
                f"use a multiple of {parts}"
            )
        self.batch_size, self._views, self._dtype = batch_size, tags.views, tags.dtype
        self._codec = jax.device_put(codec, replicated(mesh))
        self._split = batch_sharding(mesh)

    def __call__(self, images):
        """uint8 [N, H, W, 3], N at most batch_size -> arrays [batch_size, h, w, 2C]."""
        rest = self.batch_size - len(images)
        images = np.pad(images, [(0, rest), (0, 0), (0, 0), (0, 0)])
        images = jax.device_put(images, self._split)
        look = lambda mirror: encode(self._codec, images, mirror, self._dtype)
        return [look(bool(view)) for view in range(self._views)]


@partial(jax.jit, static_argnames="dtype")
def encode(codec, images, mirror, dtype):
    """uint8 [B, H, W, 3], as it is or in the mirror -> moments [B, h, w, 2C]."""
    images = jnp.where(mirror, images[:, :, ::-1], images)
    return codec.encode(images).astype(dtype)


def _batches(source, encoder, tags, shards, threads, workers):
    """-> iterator of Batch in order; reading and encoding go on ahead of it."""
    reader = Workers(source, workers, read_with_gaps) if workers else None
    read = reader or partial(read_with_gaps, source)
    chunks = (
        (number, ids[at : at + encoder.batch_size])
        for number in shards
        for ids in [tags.shard(number)[1]]
        for at in range(0, len(ids), encoder.batch_size)
    )

    def begin(chunk):
        number, ids = chunk
        return number, ids, pool.submit(read, ids, np.zeros(len(ids), bool))

    def encoded(reading):
        number, ids, future = reading
        rows, broken = future.result()
        return Batch(number, ids, rows["label"], broken, encoder(rows["image"]))

    with ThreadPoolExecutor(threads, thread_name_prefix="read") as pool:
        try:
            yield from _ahead(map(encoded, _ahead(map(begin, chunks), threads)), 2)
        finally:
            pool.shutdown(cancel_futures=True)
            if reader:
                reader.close()


def _ahead(items, count):
    """The same items, of which `count` more have been begun."""
    begun = collections.deque()
    for item in items:
        begun.append(item)
        if len(begun) > count:
            yield begun.popleft()
    yield from begun
