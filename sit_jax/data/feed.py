"""Batches whose records depend on (seed, step, batch size) and on nothing else.

Row r of step s is position s * batch_size + r of one endless order: every epoch a new
permutation, the next epoch beginning where the last one ends, also inside a batch.
Whether a record is seen in a mirror is a coin tossed for its position. Hosts, devices,
threads, processes and restarts only decide who reads which rows, and when.
"""

import collections
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np

from sit_jax.data.coins import coins
from sit_jax.data.reading import Broken, read
from sit_jax.data.workers import Workers
from sit_jax.errors import UserError


def batches(
    source,
    batch_size,
    seed,
    first_step,
    mesh,
    threads=4,
    workers=0,
    say=None,
    skip=0,
):
    """-> endless iterator of {"image" | "moments" | "latent", "label"} from first_step.

    The arrays are global, [batch_size, ...], and split over the mesh. `threads` batches
    are read ahead; with workers > 0 that many processes do the reading for them, which
    helps where images are decoded on many cores. say(line) hears of broken images.
    skip: records taken beyond first_step * batch_size, by steps of another size.
    """
    from sit_jax.parallel.mesh import BATCH, batch_sharding

    if len(source) == 0:
        raise UserError("the data source is empty; give it at least one record")
    shards = math.prod(mesh.shape[axis] for axis in BATCH)
    if batch_size < 1 or batch_size % shards:
        raise UserError(
            f"batch_size={batch_size} cannot be split over {shards} devices; "
            f"use a multiple of {shards}"
        )
    if threads < 1 or workers < 0:
        raise UserError(f"threads={threads}, workers={workers}: at least 1 and 0")
    ids, sharding = order(len(source), seed), batch_sharding(mesh)
    mirrors = partial(coins, seed) if getattr(source, "flip", False) else _never
    broken = Broken(source, say or partial(print, file=sys.stderr, flush=True))
    reader = Workers(source, workers) if workers else partial(read, source)
    first = first_step * batch_size + skip
    return Feed(reader, batch_size, ids, mirrors, sharding, first, threads, broken)


def abstract_batch(source, batch_size, mesh):
    """Shapes of what batches() yields, to compile for before the first one is read."""
    import jax

    from sit_jax.parallel.mesh import batch_sharding

    def shaped(value):
        value, where = np.asarray(value), batch_sharding(mesh)
        shape = (batch_size, *value.shape)
        return jax.ShapeDtypeStruct(shape, value.dtype, sharding=where)

    return {name: shaped(value) for name, value in source[0].items()}


def order(length, seed):
    """-> endless sequence of record ids; every epoch permutes range(length) anew."""
    try:
        import grain
    except ImportError as error:
        raise UserError("batches are ordered by grain: pip install grain") from error
    if seed < 0:
        raise UserError(f"seed={seed} must not be negative")
    # grain shuffles epoch e by seed + e: hashed, or seed 1 would repeat seed 0 shifted
    hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    ids = grain.MapDataset.range(length).shuffle(seed=hashed).repeat()
    ids[0]  # grain sets itself up at first use, which must not happen in two threads
    return ids


def _never(positions):
    return np.zeros(len(positions), bool)


def rows(places, batch_size):
    """The rows of a global batch that devices hold, given their slices of it."""
    held = (range(batch_size)[place[0]] for place in places)
    return sorted(set().union(*held))


class Feed:
    """Reads ahead in threads; keeps one more batch on the devices if it is ready."""

    def __init__(
        self, reader, batch_size, ids, mirrors, sharding, first, threads, broken
    ):
        self._reader, self._batch_size, self._ids = reader, batch_size, ids
        self._mirrors, self._sharding, self._broken = mirrors, sharding, broken
        places = self._sharding.addressable_devices_indices_map((batch_size,))
        self._rows = rows(places.values(), batch_size)
        self._first = {row: i for i, row in enumerate(self._rows)}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="feed")
        self._next, self._waited, self._placed = first, 0.0, None
        self._pending = collections.deque()
        for _ in range(threads):
            self._submit()

    def __iter__(self):
        return self

    def __next__(self):
        if self._pool is None:
            raise StopIteration
        try:
            batch = self._placed or self._take()
            self._placed = self._take() if self._ready() else None
        except BaseException:
            self.close()  # going on would leave out a step
            raise
        return batch

    def waited(self):
        """Seconds spent waiting for data since the last call."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def close(self):
        """Ends the threads; safe to call twice."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            getattr(self._reader, "close", lambda: None)()
        self._pool = self._placed = None
        self._pending.clear()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _submit(self):
        self._pending.append(self._pool.submit(self._read, self._next))
        self._next += self._batch_size

    def _ready(self):
        future = self._pending[0]
        return future.done() and future.exception() is None

    def _take(self):
        """The next batch, as global arrays."""
        start = time.perf_counter()
        batch, broken = self._pending.popleft().result()
        self._broken.add(broken)
        self._waited += time.perf_counter() - start
        self._submit()
        return {name: self._place(array) for name, array in batch.items()}

    def _read(self, first):
        """This process's rows of a batch, as numpy arrays, and what was broken."""
        positions = [first + row for row in self._rows]
        ids = [int(self._ids[position]) for position in positions]
        return self._reader(ids, self._mirrors(positions))

    def _place(self, array):
        import jax

        def held(index):
            wanted = range(self._batch_size)[index[0]]
            start = self._first[wanted[0]]
            return array[start : start + len(wanted)]

        shape = (self._batch_size, *array.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, held)
