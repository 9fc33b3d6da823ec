"""A cache gives back what went in."""

import copy
import json
import sys

import numpy as np
import pytest
from caches import TAGS, changed, moments, write

from sit_jax.data import cache
from sit_jax.data.cache import LatentCache, about_data
from sit_jax.data.coins import coins
from sit_jax.data.filling import missing, open_plan, shard
from sit_jax.data.pairs import from_pairs, to_pairs
from sit_jax.data.shards import BLOCK, HEAD, ShardReader, ShardWriter, file_size
from sit_jax.data.sources import LatentFolder
from sit_jax.data.tags import default_shards
from sit_jax.errors import UserError
from sit_jax.models.codec import Latents


def test_records_come_back_with_their_mirror_images(tmp_path):
    write(tmp_path / "c")
    cache = LatentCache(tmp_path / "c")
    assert (len(cache), cache.shape, cache.classes) == (11, (3, 2, 4), 5)
    assert cache.flip and cache.class_names[4] == "class 4"
    for i in (0, 10, 3, 4, 7):
        record, mirrored = cache[i], cache.mirrored(i)
        np.testing.assert_array_equal(record["moments"], moments(i))
        np.testing.assert_array_equal(mirrored["moments"], moments(i, 1))
        assert record["label"] == mirrored["label"] == i % 5
        assert record["moments"].dtype == np.float32 and cache.id(i) == i
    with pytest.raises(IndexError):
        cache[11]
    files = sorted(file.name for file in (tmp_path / "c").iterdir())
    assert files[:2] == ["cache.json", "moments-00000-of-00003.array_record"]
    assert len(files) == 5  # three shards, cache.json and plan.json


def test_half_floats_come_back_as_floats(tmp_path):
    tags = changed(dtype="float16", views=1)
    write(tmp_path, tags)
    cache = LatentCache(tmp_path, flip=False)
    assert cache[2]["moments"].dtype == np.float32 and not cache.flip
    np.testing.assert_array_equal(cache[2]["moments"], moments(2, 0, tags))


def test_broken_images_are_left_out(tmp_path):
    about = write(tmp_path, broken={0, 4, 5, 6})  # 3..6 are the second shard
    cache = LatentCache(tmp_path)
    assert len(cache) == 7 and about["images"] == [2, 1, 4]
    ids = [1, 2, 3, 7, 8, 9, 10]
    assert [cache.id(i) for i in range(7)] == ids
    assert [int(record["label"]) for record in cache] == [i % 5 for i in ids]
    assert (
        json.loads((tmp_path / "cache.json").read_text())["broken"]["4"]
        == "4.jpg: torn"
    )
    write(tmp_path / "none", broken=set(range(11)))
    assert len(LatentCache(tmp_path / "none")) == 0


def test_copies_open_their_own_files(tmp_path):
    write(tmp_path)
    cache = LatentCache(tmp_path)
    cache[0]  # opens a file, which cannot be copied
    for i, record in enumerate(copy.deepcopy(cache)):
        np.testing.assert_array_equal(record["moments"], moments(i))


def test_statistics_are_those_of_scaled_draws(tmp_path):
    about = write(tmp_path, changed(records=300, views=1, shards=2))
    cache = LatentCache(tmp_path, flip=False)
    mean, log_var = np.split(np.stack([r["moments"] for r in cache]), 2, -1)
    noise = np.random.default_rng(0).normal(size=(40, *mean.shape))
    x = 0.5 * (mean + np.exp(log_var / 2) * noise).reshape(-1, 2)
    # 72,000 draws of 1,800 latents: their mean is that exactly, as the noise is known
    found = about["latents"]
    np.testing.assert_allclose(found["mean"], 0.5 * mean.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(found["std"], x.std(0), rtol=0.02)


def test_what_a_checkpoint_says_of_its_data():
    class Source:
        tags, class_names = TAGS, ("ant", "bee")

    said = {"encoder_sha256": "e" * 64, "class_names": ["ant", "bee"]}
    assert about_data(Source, Latents()) == said  # the cache's encoder, not the codec's
    assert about_data([], Latents()) == {}
    assert about_data([], TAGS) == {"encoder_sha256": "e" * 64}


def test_shards_divide_the_records():
    for records, shards in ((11, 3), (7, 7), (1000, 4)):
        tags = changed(records=records, shards=shards)
        ids = [i for number in range(shards) for i in tags.shard(number)[1]]
        assert ids == list(range(records))
    assert [default_shards(n) for n in (1, 256, 257, 10**7)] == [1, 1, 2, 256]


def test_missing_shards_are_shared_and_drafts_removed(tmp_path):
    open_plan(tmp_path, TAGS)
    left = tmp_path / ".moments-00002-of-00003.77.array_record"
    left.write_bytes(b"half a shard")
    assert missing(tmp_path, TAGS, 1, 2) == [1] and left.exists()  # another's
    assert missing(tmp_path, TAGS, 0, 2) == [0, 2] and not left.exists()
    with pytest.raises(ZeroDivisionError), shard(tmp_path, TAGS, 0):
        raise ZeroDivisionError
    assert not list(tmp_path.glob("*moments*"))
    with pytest.raises(UserError, match="process 2 of 2: they count from 0"):
        missing(tmp_path, TAGS, 2, 2)


def test_the_last_record_of_a_shard_is_what_it_holds(tmp_path):
    writer = ShardWriter(tmp_path / "x")
    writer.add(5, 2, np.zeros((2, 1), np.float32))
    writer.close({"images": 1})
    assert ShardReader(tmp_path / "x").what() == {"images": 1}
    writer = ShardWriter(tmp_path / "none" / "x")
    with pytest.raises(UserError, match=r"none/x \(open\(\) failed: No such file"):
        writer.close({})


def test_pairs_of_fast_dit_and_back(tmp_path):
    write(tmp_path / "c")
    cache = LatentCache(tmp_path / "c")
    assert to_pairs(cache, tmp_path / "pairs", seed=3) == 11
    folder = LatentFolder(tmp_path / "pairs", classes=5)
    assert (len(folder), folder.shape) == (11, (3, 2, 2))
    raw = np.load(tmp_path / "pairs/imagenet256_features/4.npy")
    assert raw.shape == (1, 2, 3, 2) and raw.dtype == np.float32
    label = np.load(tmp_path / "pairs/imagenet256_labels/4.npy")
    assert label.shape == (1,) and label.dtype == np.int64
    tossed = coins(3, np.arange(11))
    assert 0 < tossed.sum() < 11
    for i in range(11):
        mean, log_var = np.split(moments(i, int(tossed[i])), 2, -1)
        noise = (folder[i]["latent"] / 0.5 - mean) / np.exp(log_var / 2)
        again = np.random.default_rng((3, i)).standard_normal((3, 2, 2), np.float32)
        np.testing.assert_allclose(noise, again, rtol=1e-3, atol=1e-5)  # of float32
    done, about = from_pairs(folder, tmp_path / "again", scale=0.5)
    assert done == 11 and about["tags"]["encoder_sha256"] is None
    back = LatentCache(tmp_path / "again")
    assert not back.flip and back.shape == (3, 2, 2)
    for ours, theirs in zip(back, folder, strict=True):
        np.testing.assert_array_equal(ours["latent"], theirs["latent"])
        assert ours["label"] == theirs["label"]
    with pytest.raises(UserError, match="pairs exists; --overwrite"):
        to_pairs(cache, tmp_path / "pairs")
    to_pairs(back, tmp_path / "once more")
    np.testing.assert_array_equal(
        np.load(tmp_path / "once more/imagenet256_features/4.npy"), raw
    )


def test_array_record_is_named_where_it_is_missing(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "array_record.python", None)
    with pytest.raises(UserError, match="pip install array_record"):
        LatentCache(tmp_path)[0]


def test_every_half_becomes_its_single():
    """All 65,536 bit patterns, also those that are not finite."""
    halves = np.arange(2**16, dtype="<u2").view("<f2").reshape(2**6, -1, 4)
    found = cache._single(halves)
    assert found.dtype == np.float32 and found.shape == halves.shape
    np.testing.assert_array_equal(found, halves.astype(np.float32))


@pytest.mark.parametrize("images", [1, 8, 500])
def test_the_size_of_a_file_is_known_before_it_is_written(tmp_path, images):
    view = np.random.default_rng(0).standard_normal((2, 2, 4)).astype(np.float32)
    writer = ShardWriter(tmp_path / "a")
    for i in range(images):
        writer.add(i, 0, [view, view])
    writer.close({"images": images})
    told = file_size(2 * images, view.nbytes + HEAD.size)
    found = (tmp_path / "a").stat().st_size
    assert found <= told <= found + 2 * BLOCK
