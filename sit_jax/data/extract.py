"""Images to moments: decoded, encoded on all devices, written in shards.

What a shard holds follows from its number, the source and the codec: processes only
share out the numbers, and one that was killed begins again at the shard it was in.
"""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from sit_jax.data import latent_cache
from sit_jax.data.images import CROP
from sit_jax.data.latent_cache import CacheMetadata, EncodedImages
from sit_jax.data.loader import CorruptImages, prefetch, read_next, read_records
from sit_jax.data.sources import DataSource
from sit_jax.errors import UserError
from sit_jax.files import local_path
from sit_jax.parallel import mesh as mesh_lib
from sit_jax.parallel import multihost


@dataclasses.dataclass(frozen=True)
class ExtractOptions:
    """How images are read and shared out; none of it changes what is written.

    Process `process` of `count` takes every count-th shard. `say` hears of corrupt
    images, `show` of (images done, images in all) after every batch.
    """

    batch_size: int = 64
    process: int = 0
    count: int = 1
    threads: int = 4  # batches that are read ahead
    workers: int = 0  # processes that decode instead of the threads
    say: Callable[[str], None] = print
    show: Callable[[int, int], None] = lambda images, total: None


def describe(
    source: DataSource,
    codec: Any,
    dtype: str = "float32",
    flip: bool = True,
    shards: int | None = None,
) -> CacheMetadata:
    """Returns the metadata of the cache that a source of images and a VAE give."""
    shards = latent_cache.default_shards(len(source)) if shards is None else shards
    one = jax.ShapeDtypeStruct((1, *source.shape), np.uint8)
    return CacheMetadata(
        kind="moments",
        shape=jax.eval_shape(lambda codec, x: codec.encode(x), codec, one).shape[1:],
        dtype=dtype,
        views=1 + bool(flip),
        encoder_sha256=codec.encoder_sha256,
        precision=codec.precision.name,
        scale=codec.scale,
        size=source.shape[0],
        crop=CROP,
        listing_sha256=source.listing_sha256(),
        records=len(source),
        classes=source.classes,
        shards=min(shards, len(source)),
    )


def extract(
    source: DataSource,
    codec: Any,
    out: str,
    metadata: CacheMetadata,
    options: ExtractOptions | None = None,
) -> tuple[int, dict | None]:
    """Writes this process's shards of a cache.

    Args:
      source: of images.
      codec: the VAE.
      out: the folder of the cache; an unfinished one is continued.
      metadata: of describe().
      options: how the work is done.

    Returns:
      the number of images done now, and what cache.json says: None as long as shards
      of other processes are missing.
    """
    options = options or ExtractOptions()
    # processes that never meet have a lock each: only none may be there twice
    apart = options.count != multihost.process_count()
    name = f"lock.{options.process}-of-{options.count}" if apart else "lock"
    with multihost.lock(local_path(out), name):
        if multihost.is_primary():
            latent_cache.begin_cache(out, metadata)
        multihost.assert_shared(local_path(out) / latent_cache.PLAN)
        path = latent_cache.begin_cache(out, metadata)
        images = _write_shards(path, source, codec, metadata, options)
        multihost.barrier()
        about = None
        if multihost.is_primary():
            about = latent_cache.finish_cache(path, metadata, source.class_names)
        return images, multihost.broadcast(about)


def make_encoder(
    codec: Any, metadata: CacheMetadata, batch_size: int
) -> Callable[[UInt8[np.ndarray, "n h w 3"]], list[Float[Array, "b h w c"]]]:
    """Returns a function from images to the moments of each view, on local devices.

    One program encodes all batches: a shorter one is filled up to the batch size.
    """
    mesh = mesh_lib.make_mesh(data=-1, fsdp=1, devices=jax.local_devices())
    parts = mesh_lib.num_batch_shards(mesh)
    if batch_size % parts:
        raise UserError(
            f"batch size {batch_size} cannot be split over {parts} devices; "
            f"use a multiple of {parts}"
        )
    codec = jax.device_put(codec, mesh_lib.replicated(mesh))

    def encode_views(images):
        missing = batch_size - len(images)
        images = np.pad(images, [(0, missing), (0, 0), (0, 0), (0, 0)])
        images = jax.device_put(images, mesh_lib.batch_sharding(mesh))
        views = range(metadata.views)
        return [encode(codec, images, bool(view), metadata.dtype) for view in views]

    return encode_views


@partial(jax.jit, static_argnames="dtype")
def encode(
    codec: Any, images: UInt8[Array, "b h w 3"], mirror: bool, dtype: str
) -> Float[Array, "b h w c"]:
    """Returns the moments of images, as they are or mirrored left to right."""
    images = jnp.where(mirror, images[:, :, ::-1], images)
    return codec.encode(images).astype(dtype)


def _write_shards(path: Path, source, codec, metadata, options) -> int:
    """Writes the shards of this process that are missing; returns their images."""
    numbers = latent_cache.missing_shards(
        path, metadata, options.process, options.count
    )
    total = sum(len(metadata.shard_ids(number)) for number in numbers)
    encoder = make_encoder(codec, metadata, options.batch_size)
    if not total:
        return 0
    options.show(0, total)  # a bar that begins with the first batch would think it fast
    corrupt = CorruptImages(source, options.say, treatment="it is left out")

    def intact(encoded):
        for _, batch in encoded:
            corrupt.add(batch.corrupt)
            yield _without_corrupt(batch, source)
            options.show(len(batch.ids), total)

    batches = _encoded_batches(source, encoder, metadata, numbers, options)
    with contextlib.closing(batches):
        for number, encoded in itertools.groupby(batches, lambda pair: pair[0]):
            latent_cache.write_shard(path, metadata, number, intact(encoded))
    return total


def _without_corrupt(batch, source):
    """Returns the images of a batch that could be read, when they are computed."""
    rows = np.flatnonzero(batch.labels >= 0)
    ids = np.array(batch.ids)[rows]
    views = [np.asarray(view)[rows] for view in batch.views]
    is_finite = np.isfinite(views).all((0, 2, 3, 4))
    if not is_finite.all():
        name = source.name(int(ids[~is_finite][0]))
        raise UserError(f"the moments of {name} are not finite; is it the right VAE?")
    return EncodedImages(ids, batch.labels[rows], views, batch.corrupt)


def _encoded_batches(
    source, encoder, metadata, shards, options
) -> Iterator[tuple[int, EncodedImages]]:
    """Yields (shard, batch) in order; reading and encoding run ahead of what is taken.

    A corrupt image has the label -1.
    """
    import grain

    chunks = [
        (number, ids[start : start + options.batch_size])
        for number in shards
        for ids in [metadata.shard_ids(number)]
        for start in range(0, len(ids), options.batch_size)
    ]
    steps = grain.MapDataset.source(chunks).map(partial(_read_chunk, source))
    begun = collections.deque()
    with contextlib.closing(prefetch(steps, options.threads, options.workers)) as reads:
        for number, ids in chunks:
            rows, corrupt = read_next(reads)
            views = encoder(rows["image"])  # JAX returns before it is computed
            begun.append((number, EncodedImages(ids, rows["label"], views, corrupt)))
            if len(begun) > 2:
                yield begun.popleft()
        yield from begun


def _read_chunk(source, chunk):
    _, ids = chunk
    return read_records(source, ids, np.zeros(len(ids), bool), replace=False)
