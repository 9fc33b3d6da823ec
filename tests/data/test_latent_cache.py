"""A cache gives back what went in; one made otherwise, damaged or none is refused."""

import copy
import dataclasses
import json
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
from helpers.codecs import toy

from sit_jax.data.latent_cache import (
    CacheMetadata,
    EncodedImages,
    LatentCache,
    begin_cache,
    check_cache,
    default_shards,
    describe_data,
    finish_cache,
    import_fast_dit,
    missing_shards,
    write_shard,
)
from sit_jax.data.sources import LatentFolder, Synthetic
from sit_jax.errors import UserError
from sit_jax.models.codec import Latents

OLD = Path(__file__).parent / "old_version/latent_cache.zip"
METADATA = CacheMetadata(
    kind="moments",
    shape=(3, 2, 4),
    dtype="float32",
    views=2,
    encoder_sha256="e" * 64,
    precision="exact",
    scale=0.5,
    size=16,
    crop="ADM centre crop",
    listing_sha256="l" * 64,
    records=11,
    classes=5,
    shards=3,
)


def changed(**fields):
    return dataclasses.replace(METADATA, **fields)


def moments(i, view=0, metadata=METADATA):
    """Moments of record i, and of its mirror image: nothing like them."""
    rng = np.random.default_rng((i, view))
    return rng.normal(size=metadata.shape).astype(metadata.dtype)


def write(path, metadata=METADATA, corrupt=()):
    """Writes a cache of moments(i) with label i % 5, without the corrupt ones."""
    begin_cache(path, metadata)
    for number in missing_shards(path, metadata):
        ids = metadata.shard_ids(number)
        reasons = {i: f"{i}.jpg: torn" for i in ids if i in corrupt}
        ids = [i for i in ids if i not in corrupt]
        views = [[moments(i, k, metadata) for i in ids] for k in range(metadata.views)]
        views = [np.reshape(v, (-1, *metadata.shape)) for v in views]
        batch = EncodedImages(ids, [i % 5 for i in ids], views, reasons)
        write_shard(path, metadata, number, [batch])
    names = [f"class {c}" for c in range(metadata.classes)]
    return finish_cache(path, metadata, names)


def assert_holds(cache, ids):
    """Asserts that a cache has the records of these numbers, in both views."""
    assert len(cache) == len(ids)
    for i, image_id in enumerate(ids):
        for view, record in enumerate((cache[i], cache.flipped(i))):
            wanted = moments(image_id, view, cache.metadata)
            np.testing.assert_array_equal(record["moments"], wanted)
            assert record["moments"].dtype == np.float32
            assert record["label"] == image_id % 5


def test_cache_of_version_0_1_is_read_and_written_the_same(tmp_path):
    """Seven records of float16 in two shards, the sixth of them corrupt."""
    shutil.unpack_archive(OLD, tmp_path / "old")
    cache = LatentCache(tmp_path / "old")
    metadata = changed(records=7, shards=2, dtype="float16")
    assert cache.metadata == metadata
    assert_holds(cache, [0, 1, 2, 3, 4, 6])
    write(tmp_path / "new", metadata, corrupt={5})
    for file in (tmp_path / "old").iterdir():
        assert file.read_bytes() == (tmp_path / "new" / file.name).read_bytes()
    assert begin_cache(tmp_path / "old", metadata) == tmp_path / "old"  # to be resumed


def test_cache_gives_back_records_and_their_mirror_images(tmp_path):
    write(tmp_path)
    cache = LatentCache(tmp_path)
    assert (cache.shape, cache.classes) == ((3, 2, 4), 5)
    assert cache.flip and cache.class_names[4] == "class 4"
    assert_holds(cache, range(11))
    assert_holds(copy.deepcopy(cache), range(11))  # which opens its own files
    with pytest.raises(IndexError):
        cache[11]
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files[:2] == ["cache.json", "moments-00000-of-00003.array_record"]
    assert len(files) == 5  # three shards, cache.json and plan.json


def test_corrupt_images_are_left_out(tmp_path):
    about = write(tmp_path, corrupt={0, 4, 5, 6})  # 3..6 are the second shard
    assert about["images"] == [2, 1, 4]
    assert_holds(LatentCache(tmp_path), [1, 2, 3, 7, 8, 9, 10])
    about = json.loads((tmp_path / "cache.json").read_text())
    assert about["broken"]["4"] == "4.jpg: torn"
    write(tmp_path / "none", corrupt=set(range(11)))
    assert len(LatentCache(tmp_path / "none")) == 0


def test_statistics_are_those_of_scaled_draws(tmp_path):
    about = write(tmp_path, changed(records=300, views=1, shards=2))
    cache = LatentCache(tmp_path, flip=False)
    mean, log_var = np.split(np.stack([r["moments"] for r in cache]), 2, -1)
    noise = np.random.default_rng(0).normal(size=(40, *mean.shape))
    x = 0.5 * (mean + np.exp(log_var / 2) * noise).reshape(-1, 2)
    # 72,000 draws of 1,800 latents: their mean is that exactly, as the noise is known
    stats = about["latents"]
    np.testing.assert_allclose(stats["mean"], 0.5 * mean.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(stats["std"], x.std(0), rtol=0.02)


def test_describe_data_names_encoder_and_classes():
    source = Synthetic()
    assert describe_data(source, Latents()) == {}
    assert describe_data(source, toy()) == {"encoder_sha256": "e" * 64}
    cache = types.SimpleNamespace(metadata=METADATA, class_names=("ant", "bee"))
    about = {"encoder_sha256": "e" * 64, "class_names": ["ant", "bee"]}
    assert describe_data(cache, Latents()) == about  # the cache's, not the codec's


def test_shards_divide_the_records():
    for records, shards in ((11, 3), (7, 7), (1000, 4)):
        metadata = changed(records=records, shards=shards)
        ids = [i for number in range(shards) for i in metadata.shard_ids(number)]
        assert ids == list(range(records))
    assert [default_shards(n) for n in (1, 256, 257, 10**7)] == [1, 1, 2, 256]


def test_missing_shards_are_shared_and_leftovers_removed(tmp_path):
    begin_cache(tmp_path, METADATA)
    leftover = tmp_path / ".moments-00002-of-00003.array_record.a77"
    leftover.mkdir()
    (leftover / "moments-00002-of-00003.array_record").write_bytes(b"half a shard")
    assert missing_shards(tmp_path, METADATA, 1, 2) == [1] and leftover.exists()
    assert missing_shards(tmp_path, METADATA, 0, 2) == [0, 2]
    assert not leftover.exists()

    def fail_after_one():
        yield EncodedImages([0], [0], [[moments(0)], [moments(0)]])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_shard(tmp_path, METADATA, 0, fail_after_one())
    assert not list(tmp_path.glob("*moments*"))
    with pytest.raises(UserError, match="process 2 of 2: they count from 0"):
        missing_shards(tmp_path, METADATA, 2, 2)


def test_fast_dits_folder_becomes_a_cache(tmp_path):
    latents = np.random.default_rng(0).standard_normal((11, 1, 4, 3, 2), np.float32)
    for part, arrays in (("features", latents), ("labels", np.arange(11) % 5)):
        folder = tmp_path / f"pairs/imagenet256_{part}"
        folder.mkdir(parents=True)
        for i in range(11):
            np.save(folder / f"{i}.npy", arrays[i])
    folder, counts = LatentFolder(tmp_path / "pairs", classes=5), []
    show = lambda *images: counts.append(images)
    about = import_fast_dit(folder, tmp_path / "c", scale=0.5, show=show)
    assert about["images"] == [11] and about["tags"]["encoder_sha256"] is None
    assert counts == [(1, 11)] * 11
    cache = LatentCache(tmp_path / "c")
    assert not cache.flip and cache.shape == (3, 2, 4)
    for ours, theirs in zip(cache, folder, strict=True):
        np.testing.assert_array_equal(ours["latent"], theirs["latent"])
        assert ours["label"] == theirs["label"]


@pytest.mark.parametrize(
    "metadata, codec, shape, message",
    [
        (METADATA, Latents(scale=0.5), (3, 2, 2), None),
        (changed(scale=None, encoder_sha256=None), toy(), (3, 2, 2), None),
        (METADATA, Latents(), (3, 2, 2), "was made with scale 0.5, not 0.18215; set"),
        (METADATA, Latents(scale=0.5), (3, 2, 4), r"\(3, 2, 2\), not \(3, 2, 4\); set"),
        (changed(kind="latent"), Latents(scale=0.5), (3, 2, 4), None),
        (changed(encoder_sha256="f" * 64), toy(), (3, 2, 2), "encoder_sha256 ffff"),
    ],
    ids="same unknown scale shape latent encoder".split(),
)
def test_check_cache_refuses_one_unlike_the_config(metadata, codec, shape, message):
    cache = types.SimpleNamespace(metadata=metadata)
    if message is None:
        return check_cache(cache, codec, shape)
    with pytest.raises(UserError, match=message) as caught:
        check_cache(cache, codec, shape)
    assert "\n" not in str(caught.value)


def test_cache_without_flips_is_refused_where_flips_are_wanted(tmp_path):
    write(tmp_path, changed(views=1))
    with pytest.raises(UserError, match="without flips; set flip=False "):
        LatentCache(tmp_path)
    assert not LatentCache(tmp_path, flip=False).flip


@pytest.mark.parametrize(
    "field, value", [("encoder_sha256", "f"), ("precision", "bf16"), ("shards", 4)]
)
def test_going_on_otherwise_is_refused(tmp_path, field, value):
    begin_cache(tmp_path, METADATA)
    message = f"made with {field} {getattr(METADATA, field)}, not {value}; extract into"
    with pytest.raises(UserError, match=message):
        begin_cache(tmp_path, changed(**{field: value}))


def test_folders_that_are_no_caches_are_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}/none has no cache.json; run"):
        LatentCache(tmp_path / "none")
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="holds holiday.jpg and no cache; take another"):
        begin_cache(tmp_path, METADATA)
    path = begin_cache(tmp_path / "begun", METADATA)
    with pytest.raises(UserError, match="has no cache.json; run extract_features.py"):
        LatentCache(path)
    assert finish_cache(path, METADATA, []) is None
    (path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="plan.json is not JSON"):
        begin_cache(path, METADATA)
    (path / "cache.json").write_text("{")
    with pytest.raises(UserError, match="cache.json is not JSON"):
        LatentCache(path)
    (path / "cache.json").write_text('{"tags": {"colour": 1}}')
    with pytest.raises(UserError, match="another version .*colour.*; extract it again"):
        LatentCache(path)


SPOILT = {
    "empty": lambda data: b"",
    "short": lambda data: data[:300],
    "other": lambda data: b"?" * 70_000,
    "number": lambda data: data.replace(moments(4).tobytes()[20:24], b"????"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_damaged_shards_are_named(tmp_path, case):
    write(tmp_path)
    cache, file = LatentCache(tmp_path), tmp_path / METADATA.shard_name(1)
    file.write_bytes(SPOILT[case](file.read_bytes()))
    with pytest.raises(UserError, match=f"cannot read {file} .*; remove it") as caught:
        cache[4]
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(cache[10]["moments"], moments(10))  # of another shard
