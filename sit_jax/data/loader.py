"""Batches whose records depend on (seed, step, batch size) and on nothing else.

Row r of step s is position s * batch_size + r of one endless order: every epoch a new
permutation, the next epoch beginning where the last one ends, also inside a batch.
Whether a record is flipped is a coin tossed for its position. Hosts, devices, threads,
processes and restarts only decide who reads which rows, and when.

Grain shuffles, repeats and batches the numbers of records, then one function reads a
batch, in threads or processes that grain runs ahead. JAX is imported inside functions,
so that code which only reads records starts without it.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Int

from sit_jax.data.images import CorruptImage
from sit_jax.data.sources import RECORD_DTYPES, DataSource, Record
from sit_jax.errors import UserError, one_line

if TYPE_CHECKING:
    import jax

Rows = dict[str, np.ndarray]


def batches(
    source: DataSource,
    batch_size: int,
    seed: int,
    mesh: "jax.sharding.Mesh",
    *,
    first: int = 0,
    threads: int = 4,
    workers: int = 0,
    say: Callable[[str], None] | None = None,
) -> "Loader":
    """Returns an endless iterator of a source's batches.

    Args:
      source: the records.
      batch_size: of all processes together; a multiple of the mesh's batch shards.
      seed: of the order and the flips.
      mesh: whose batch axes the arrays are split over.
      first: position in the order at which the first batch begins. A run that goes on
        after n steps begins at n * batch_size.
      threads: batches that are read ahead, each in a thread.
      workers: processes that read instead of the threads, which helps where images are
        decoded on many cores.
      say: hears of corrupt images; by default they are printed to stderr.

    Raises:
      UserError: the source is empty.
    """
    from sit_jax.parallel.mesh import batch_sharding

    if len(source) == 0:
        raise UserError("the data source is empty; give it at least one record")
    sharding = batch_sharding(mesh)
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = held_rows(slices, batch_size)
    steps = local_batches(source, batch_size, seed, first, rows)
    put = partial(_device_put, sharding, batch_size, rows)
    corrupt = CorruptImages(source, say or partial(print, file=sys.stderr, flush=True))
    return Loader(prefetch(steps, threads, workers), corrupt, put)


class Loader(Iterator, AbstractContextManager):
    """An endless iterator of batches {"image" | "moments" | "latent", "label"}.

    The arrays are global, [batch_size, ...], and split over the mesh.
    """

    def __init__(self, steps, corrupt: "CorruptImages", put: Callable):
        self._steps, self._corrupt, self._put = steps, corrupt, put
        self._waited = 0.0

    def __next__(self) -> "dict[str, jax.Array]":
        if self._steps is None:
            raise StopIteration
        start = time.perf_counter()
        try:
            rows, corrupt = read_next(self._steps)
            self._corrupt.add(corrupt)
        except BaseException:
            self.close()  # going on would leave out a step
            raise
        self._waited += time.perf_counter() - start
        return {name: self._put(array) for name, array in rows.items()}

    def waited(self) -> float:
        """Returns the seconds spent waiting for data since the last call."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def close(self):
        """Ends the threads and processes; safe to call twice."""
        if self._steps is not None:
            self._steps.close()
        self._steps = None

    def __exit__(self, *error):
        self.close()


def abstract_batch(
    source: DataSource, batch_size: int, mesh: "jax.sharding.Mesh"
) -> "dict[str, jax.ShapeDtypeStruct]":
    """Returns the shapes of a batch, to compile for before the first one is read."""
    import jax

    from sit_jax.parallel.mesh import batch_sharding

    rows, _ = read_records(source, [0], [False])
    shapes = {name: (batch_size, *value.shape[1:]) for name, value in rows.items()}
    make = partial(jax.ShapeDtypeStruct, sharding=batch_sharding(mesh))
    return {name: make(shape, rows[name].dtype) for name, shape in shapes.items()}


def shuffled_indices(length: int, seed: int):
    """Returns an endless grain.MapDataset of record numbers.

    Every epoch permutes range(length) anew.
    """
    import grain

    # grain shuffles epoch e by seed + e: hashed, or seed 1 would repeat seed 0 shifted
    hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return grain.MapDataset.range(length).shuffle(seed=hashed).repeat()


def local_batches(
    source: DataSource, batch_size: int, seed: int, first: int, rows: Sequence[int]
):
    """Returns an endless grain.MapDataset of what read_records returns.

    Args:
      source: the records.
      batch_size: of all processes together.
      seed: of the order and the flips.
      first: the position in the order at which the first batch begins.
      rows: those of each batch that are read here.
    """
    ids = shuffled_indices(len(source), seed)[first:].batch(batch_size)
    return ids.map_with_index(partial(_read_step, source, seed, first, np.array(rows)))


def random_flip(seed: int, positions: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Returns for each position of the order whether it is flipped: a fair coin.

    Source: the top bit of splitmix64 (Steele, Lea, Flood 2014, "Fast splittable
    pseudorandom number generators"), started at a hash of the seed that the order does
    not use.
    """
    start = np.random.SeedSequence((seed, 1)).generate_state(1, np.uint64)
    x = start + np.asarray(positions, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x ^ (x >> np.uint64(31))) >> np.uint64(63) == 1


def held_rows(slices: Iterable[tuple[slice, ...]], batch_size: int) -> list[int]:
    """Returns the rows of a global batch that devices hold, given their slices."""
    rows = (range(batch_size)[index[0]] for index in slices)
    return sorted(set().union(*rows))


def prefetch(steps, threads: int, workers: int = 0) -> Iterator[Any]:
    """Returns an iterator over a grain.MapDataset that is read ahead, in its order.

    Args:
      steps: the dataset.
      threads: elements that are read ahead.
      workers: processes that read instead of the threads, two elements ahead each.
    """
    import grain
    from absl import flags

    count = 1 if workers else threads
    options = grain.ReadOptions(num_threads=count, prefetch_buffer_size=count)
    dataset = steps.to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()  # grain's processes look at absl's flags
        options = grain.MultiprocessingOptions(workers, per_worker_buffer_size=1)
        dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            dataset, prefetch_buffer_size=1
        )
    iterator = iter(dataset)
    iterator.start_prefetch()
    return iterator


def read_next(iterator: Iterator[Any]) -> Any:
    """Returns the next element of prefetch(); a dead process is the user's to mend."""
    try:
        return next(iterator)
    except RuntimeError as error:
        if "process was terminated" not in str(error):
            raise
        raise UserError(
            "a process that reads data has died; fewer workers need less memory"
        ) from error


def read_records(
    source: DataSource, ids: Sequence[int], flips: Sequence[bool], replace: bool = True
) -> tuple[Rows, dict[int, str]]:
    """Reads records as the rows of a batch: checked, flipped, stacked.

    Args:
      source: the records.
      ids: their numbers.
      flips: for each of them, whether it is flipped.
      replace: whether a corrupt image's row is taken by the next image that is whole,
        which follows from the source alone; else it is zeros with the label -1.

    Returns:
      {name: array [len(ids), ..]}, and reasons by id of the corrupt images.
    """
    rows, corrupt = {}, {}
    for row, (i, flip) in enumerate(zip(ids, flips, strict=True)):
        record = _read_intact(source, int(i), flip, corrupt, replace)
        if not rows:
            # copied into, as a record's memory then serves for the next one again
            for name, value in record.items():
                rows[name] = np.empty((len(ids), *value.shape), value.dtype)
        for name, value in record.items():
            rows[name][row] = value
    return rows, corrupt


def read_record(source: DataSource, i: int, flip: bool = False) -> Record:
    """Returns record i with its dtypes, once its label and shape are right."""
    record = source.flipped(i) if flip else source[i]
    kinds = [kind for kind in RECORD_DTYPES if kind in record]
    if len(kinds) != 1 or "label" not in record:
        raise UserError(
            f"{source.name(i)} has {sorted(record)}; it needs label and one of "
            f"{', '.join(RECORD_DTYPES)}"
        )
    kind, dtype = kinds[0], np.dtype(RECORD_DTYPES[kinds[0]])
    array, label = np.asarray(record[kind]), int(record["label"])
    if array.shape != tuple(source.shape) or array.dtype != dtype:
        raise UserError(
            f"{source.name(i)} is {array.dtype} {list(array.shape)} instead of "
            f"{dtype} {list(source.shape)}"
        )
    if not 0 <= label < source.classes:
        raise UserError(
            f"{source.name(i)} has label {label}, but there are {source.classes} "
            f"classes (0..{source.classes - 1})"
        )
    return {kind: array, "label": np.int32(label)}


class CorruptImages:
    """Counts the images that could not be decoded, and names each of them once.

    Args:
      source: where they are from; it says how many there may be.
      say: hears a line on each.
      treatment: what becomes of them, in that line.
    """

    def __init__(
        self,
        source: DataSource,
        say: Callable[[str], None],
        treatment: str = "another image takes its place",
    ):
        self._reasons, self._length, self._say = {}, len(source), say
        self._fraction, self._treatment = source.max_corrupt_fraction, treatment

    def add(self, reasons: dict[int, str]):
        """Takes in reasons by id; refuses to go on after too many."""
        for i, reason in reasons.items():
            if i not in self._reasons:
                self._reasons[i] = reason
                self._say(one_line(f"corrupt image: {reason}; {self._treatment}"))
        if len(self._reasons) > self._fraction * self._length:
            raise UserError(
                f"{len(self._reasons)} of {self._length} images are corrupt, more than "
                f"max_corrupt_fraction={self._fraction:g} allows; remove them, or "
                "allow more (--max-corrupt-fraction, "
                f"--config.source.max_corrupt_fraction); the last: {reason}"
            )


def _read_step(source, seed, first, rows, step, ids):
    """Returns this process's rows of a batch, and the reasons of corrupt images."""
    positions = first + step * len(ids) + rows
    flips = random_flip(seed, positions) if source.flip else np.zeros(len(rows), bool)
    return read_records(source, ids[rows], flips)


def _read_intact(source, i, flip, corrupt, replace):
    """Returns record i, or what takes its place; notes in `corrupt` what is broken."""
    for _ in range(len(source)):
        if i not in corrupt:
            try:
                return read_record(source, i, flip)
            except CorruptImage as error:
                corrupt[i] = str(error)
        if not replace:
            return {"image": np.zeros(source.shape, np.uint8), "label": np.int32(-1)}
        i = (i + 1) % len(source)
    raise UserError(f"all {len(source)} images are corrupt; the last: {corrupt[i]}")


def _device_put(sharding, batch_size, rows, array):
    """Returns the global array of which this process holds these rows."""
    import jax

    first = {row: i for i, row in enumerate(rows)}

    def rows_of_device(index):
        rows = range(batch_size)[index[0]]
        start = first[rows[0]]
        return array[start : start + len(rows)]

    shape = (batch_size, *array.shape[1:])
    return jax.make_array_from_callback(shape, sharding, rows_of_device)


def _start_worker(index, count):
    """Runs in a new process, before it reads anything."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    warnings.filterwarnings("ignore", module="PIL")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """Ends this worker when its parent is gone, be it killed."""
    multiprocessing.parent_process().join()
    os._exit(1)
