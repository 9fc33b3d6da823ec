"""A cache of latents: made once from images, read by training.

A cache is a folder of moments-*-of-*.array_record and two JSON files. plan.json holds
CacheMetadata and is there from the start, so that an extraction with other settings
cannot continue it; cache.json, with the counts, is written when all shards are there.

A record of a shard is 16 bytes (image id int64, label int32, mirrored int32,
little-endian), then the array. The two views of an image are two records, so that a
reader takes the one it wants. The last record of a shard is JSON: its images, the
corrupt ones, and the sums of which the statistics in cache.json are made.
"""

import bisect
import dataclasses
import functools
import itertools
import json
import math
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from sit_jax import files
from sit_jax.data.images import names_sha256, pack_names
from sit_jax.data.loader import read_record
from sit_jax.data.sources import DataSource, LatentFolder
from sit_jax.errors import UserError
from sit_jax.files import atomic_write, local_path, parse_json, read_json

if TYPE_CHECKING:  # it imports JAX
    from sit_jax.typing import Codec

PLAN, DONE = "plan.json", "cache.json"
DTYPES = {"float32": "<f4", "float16": "<f2"}  # of what is stored: as numpy writes it
RECORD_HEAD = struct.Struct("<qii")
WRITING = "group_size:1,uncompressed"  # floats hardly shrink, and zstd doubles the time
READING = {"max_parallelism": "0"}  # for single records


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheMetadata:
    """How a cache was made. None: not known, as of latents from elsewhere."""

    kind: str  # moments, or latent (drawn and scaled already)
    shape: tuple[int, int, int]  # of a record
    dtype: str
    views: int  # records an image: 2 with a mirrored one
    encoder_sha256: str | None = None
    precision: str | None = None  # of the VAE: exact, fast or bf16
    scale: float | None = None  # that latents of variance about 1 need
    size: int | None = None  # of the images, in pixels
    crop: str | None = None
    listing_sha256: str | None = None
    records: int  # that the source had
    classes: int
    shards: int

    def shard_name(self, number: int) -> str:
        """Returns the file name of a shard."""
        return f"moments-{number:05d}-of-{self.shards:05d}.array_record"

    def shard_ids(self, number: int) -> range:
        """Returns the numbers of the source's records that a shard is made of."""
        ends = (self.records * k // self.shards for k in (number, number + 1))
        return range(*ends)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """The shape [h, w, c] of a latent drawn from a record."""
        *size, channels = self.shape
        return (*size, channels // (2 if self.kind == "moments" else 1))


class EncodedImages(NamedTuple):
    """Images of one shard.

    Attributes:
      ids: their numbers in the source.
      labels: their classes.
      views: one array, or two: as it is, and mirrored.
      corrupt: reasons by id, of the images that are left out.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    views: Sequence[Float[np.ndarray, "n h w c"]]
    corrupt: dict[int, str] = {}


class LatentCache(DataSource):
    """Moments (or latents) from a cache; where it has both flips, batches take both."""

    def __init__(self, path: str, flip: bool = True):
        self.path = local_path(path)
        if not (self.path / DONE).exists():
            raise UserError(f"{self.path} has no {DONE}; run extract_features.py")
        about = read_json(self.path / DONE)
        self.metadata = metadata = parse_metadata(about["tags"], self.path)
        if flip and metadata.views < 2 and metadata.kind == "moments":
            raise UserError(
                f"{self.path} was extracted without flips; set flip=False "
                "(--config.source.flip=False), or extract it again without --no-flip"
            )
        self.flip = flip and metadata.views == 2
        self.shape, self.classes = metadata.shape, metadata.classes
        self.class_names, self._counts = about["class_names"], about["images"]
        self._ends = list(itertools.accumulate(self._counts))  # of the shards

    def __len__(self):
        return self._ends[-1]

    def __getitem__(self, i):
        return self._read(i, view=0)

    def flipped(self, i):
        return self._read(i, view=1)

    def _read(self, i, view):
        if not 0 <= i < len(self):
            raise IndexError(i)
        metadata = self.metadata
        try:
            data = self._files[i * metadata.views + view]
            _, label, _ = RECORD_HEAD.unpack_from(data)
            values = np.frombuffer(
                data, DTYPES[metadata.dtype], offset=RECORD_HEAD.size
            )
            array = values.reshape(self.shape).astype(np.float32, copy=False)
        except (ValueError, IndexError, RuntimeError, struct.error) as error:
            name = metadata.shard_name(bisect.bisect_right(self._ends, i))
            raise _damaged(self.path / name, error) from error
        return {metadata.kind: array, "label": np.int32(label)}

    @functools.cached_property
    def _files(self):
        """The shards without their last records, as one sequence of bytes."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        views = self.metadata.views
        paths = [
            f"{self.path / self.metadata.shard_name(number)}[0:{count * views}]"
            for number, count in enumerate(self._counts)
        ]
        return ArrayRecordDataSource(paths, READING)


def check_cache(source: DataSource, codec: "Codec", shape: tuple[int, int, int]):
    """Refuses a cache that was made otherwise than a config wants.

    A source without metadata passes, and so does what cache or codec does not know.

    Args:
      source: any data source.
      codec: the config's codec.
      shape: the config's shape of data, [h, w, c].
    """
    wanted = {
        "latent_shape": tuple(shape),
        "scale": codec.scale,
        "encoder_sha256": codec.encoder_sha256,
    }
    if source.metadata is not None:
        wanted = {name: value for name, value in wanted.items() if value is not None}
        remedy = "set --config.shape or --config.vae as it was made, or extract again"
        require_same("the cache", source.metadata, wanted, remedy)


def describe_data(source: DataSource, codec: "Codec") -> dict[str, Any]:
    """Returns what a checkpoint says of its data, as far as it is known.

    These are the encoder of the latents and the names of the classes.
    """
    about = {"encoder_sha256": (source.metadata or codec).encoder_sha256}
    about["class_names"] = source.class_names and list(source.class_names)
    return {name: value for name, value in about.items() if value is not None}


def default_shards(records: int) -> int:
    """Returns as many shards as processes may want to share, at most 256."""
    return max(1, min(256, -(-records // 256)))


def parse_metadata(values: dict, path: Path) -> CacheMetadata:
    """Returns CacheMetadata from the JSON of a cache at path, or refuses it."""
    try:
        metadata = CacheMetadata(**values)
        metadata = dataclasses.replace(metadata, shape=tuple(metadata.shape))
    except TypeError as error:
        raise UserError(
            f"{path} is of another version ({error}); extract it again"
        ) from error
    counts = (metadata.records, metadata.classes, metadata.shards, metadata.views)
    is_whole = all(isinstance(n, int) and n > 0 for n in (*metadata.shape, *counts))
    is_kind = metadata.kind in ("moments", "latent") and metadata.dtype in DTYPES
    if not is_whole or not is_kind or len(metadata.shape) != 3:
        raise UserError(f"{path} is damaged: {values}; extract it again")
    return metadata


def require_same(
    cache: str | Path,
    metadata: CacheMetadata,
    wanted: dict[str, Any],
    remedy: str = "extract into another folder",
):
    """Refuses metadata unlike the wanted values, and says which one differs."""
    for name, value in wanted.items():
        if getattr(metadata, name) not in (None, value):
            raise UserError(
                f"{cache} was made with {name} {getattr(metadata, name)}, not {value}; "
                f"{remedy}"
            )


def begin_cache(path: str, metadata: CacheMetadata) -> Path:
    """Makes the folder of a cache, or checks that the one there is being made alike."""
    path = local_path(path)
    path.mkdir(parents=True, exist_ok=True)
    if (path / PLAN).exists():
        planned = parse_metadata(read_json(path / PLAN), path)
        require_same(path, planned, dataclasses.asdict(metadata))
    elif other := next((p for p in path.iterdir() if p.name[0] != "."), None):
        raise UserError(f"{path} holds {other.name} and no cache; take another folder")
    else:
        with atomic_write(path / PLAN) as name:
            name.write_text(json.dumps(dataclasses.asdict(metadata), indent=1))
    return path


def missing_shards(
    path: Path, metadata: CacheMetadata, process: int = 0, count: int = 1
) -> list[int]:
    """Returns the shards that process `process` of `count` has yet to write.

    Leftovers of killed processes are removed, and a disk without room is refused.
    """
    if not 0 <= process < count:
        raise UserError(f"process {process} of {count}: they count from 0")
    mine = range(process, metadata.shards, count)
    numbers = [k for k in mine if not (path / metadata.shard_name(k)).exists()]
    for number in numbers:
        for leftover in path.glob(f".{Path(metadata.shard_name(number)).stem}.*"):
            files.remove(leftover)
    images = sum(len(metadata.shard_ids(number)) for number in numbers)
    values = images * metadata.views * math.prod(metadata.shape)
    files.require_space(path / DONE, values * np.dtype(metadata.dtype).itemsize)
    return numbers


def write_shard(
    path: Path, metadata: CacheMetadata, number: int, batches: Iterable[EncodedImages]
) -> None:
    """Writes a shard of a cache; its file appears when it is whole."""
    from array_record.python.array_record_module import ArrayRecordWriter

    about = {"images": 0, "broken": {}}
    sums = [_latent_sums(np.zeros((0, *metadata.shape)), metadata.kind)]
    with atomic_write(path / metadata.shard_name(number)) as name:
        file = ArrayRecordWriter(str(name), WRITING)
        for batch in batches:
            views = np.stack(batch.views, 1)  # [n, views, h, w, c]
            for i, label, pair in zip(batch.ids, batch.labels, views, strict=True):
                for mirrored, view in enumerate(pair):
                    head = RECORD_HEAD.pack(int(i), int(label), mirrored)
                    _write(path, file.write, head + view.tobytes())
            about["images"] += len(views)
            about["broken"] |= batch.corrupt
            sums.append(_latent_sums(views.reshape(-1, *metadata.shape), metadata.kind))
        count, first, second = (sum(part) for part in zip(*sums, strict=True))
        about["sums"] = [count, first.tolist(), second.tolist()]
        _write(path, file.write, json.dumps(about).encode())
        _write(path, file.close)  # a full disk may show only here


def finish_cache(
    path: Path, metadata: CacheMetadata, class_names: Sequence[str]
) -> dict | None:
    """Writes cache.json if all shards are there; returns what it says, or None."""
    shards = [path / metadata.shard_name(k) for k in range(metadata.shards)]
    if not all(shard.exists() for shard in shards):
        return None
    parts = [read_last_record(shard) for shard in shards]
    scale = metadata.scale if metadata.kind == "moments" and metadata.scale else 1.0
    about = {
        "tags": dataclasses.asdict(metadata),
        "images": [part["images"] for part in parts],
        "broken": {i: reason for p in parts for i, reason in p["broken"].items()},
        "latents": _latent_statistics([part["sums"] for part in parts], scale),
        "class_names": list(class_names),
    }
    with atomic_write(path / DONE) as name:
        name.write_text(json.dumps(about, indent=1))
    return about


def read_last_record(shard: Path) -> dict:
    """Returns the JSON at the end of a shard."""
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        file = ArrayRecordReader(str(shard))
        return parse_json(file.read([file.num_records() - 1])[0])
    except (TypeError, ValueError, IndexError, RuntimeError) as error:  # of no records
        raise _damaged(shard, error) from error


def import_fast_dit(
    source: LatentFolder,
    out: str,
    scale: float = 0.18215,
    show: Callable[[int, int], None] = lambda images, total: None,
) -> dict:
    """Makes a cache of fast-DiT's folder; returns what its cache.json says.

    Each of its latents is drawn, scaled and flipped or not once and for all, so the
    cache holds latents and not moments. Nobody wrote down the encoder.

    Args:
      source: the folder.
      out: a folder for the cache.
      scale: that the latents were multiplied by.
      show: hears of images done, and of how many in all.
    """
    metadata = CacheMetadata(
        kind="latent",
        shape=tuple(source.shape),
        dtype="float32",
        views=1,
        scale=scale,
        listing_sha256=names_sha256(pack_names(source.names)),
        records=len(source),
        classes=source.classes,
        shards=default_shards(len(source)),
    )
    path = begin_cache(out, metadata)
    for number in missing_shards(path, metadata):
        ids = metadata.shard_ids(number)
        write_shard(path, metadata, number, _fast_dit_batches(source, ids, show))
    return finish_cache(path, metadata, [str(label) for label in range(source.classes)])


def _fast_dit_batches(source, ids, show):
    for i in ids:
        record = read_record(source, i)
        yield EncodedImages([i], [record["label"]], [record["latent"][None]])
        show(1, len(source))


def _latent_sums(records, kind):
    """Returns [count, sums of x, sums of x^2] of latents x drawn from records.

    Expected values over the draw: of mean + std * noise they need no noise. By channel.
    """
    x = np.asarray(records, np.float32)
    x = np.ascontiguousarray(x.reshape(-1, x.shape[-1]).T)  # long rows add up fast
    mean, log_var = np.split(x, 2) if kind == "moments" else (x, None)
    total = lambda rows: rows.sum(1, dtype=np.float64)
    second = total(np.square(mean))
    if log_var is not None:  # else the latents have been drawn
        second += total(np.exp(np.clip(log_var, -30, 20)))
    return [mean.shape[1], total(mean), second]


def _latent_statistics(sums, scale):
    """Returns mean and standard deviation of scaled latents, for each channel."""
    count, first, second = (np.sum(part, 0) for part in zip(*sums, strict=True))
    mean = first / max(count, 1)
    std = np.sqrt(np.maximum(second / max(count, 1) - mean**2, 0))
    return {"mean": (scale * mean).tolist(), "std": (scale * std).tolist()}


def _write(path, write, *data):
    """Calls write(*data); ArrayRecord's error becomes the user's."""
    try:
        write(*data)
    except RuntimeError as error:
        reason = str(error).split(";")[0]
        raise UserError(
            f"cannot write below {path} ({reason}); free space, or write elsewhere"
        ) from error


def _damaged(shard, error):
    words = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"cannot read {shard} ({words[:200]}); remove it and extract again"
    )
