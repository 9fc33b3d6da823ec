"""A cache that was made otherwise, is damaged or is none."""

import numpy as np
import pytest
from caches import TAGS, changed, moments, write
from toy_codec import toy

from sit_jax.data.cache import LatentCache, check_cache
from sit_jax.data.filling import finish, open_plan
from sit_jax.errors import UserError
from sit_jax.models.codec import Latents


@pytest.mark.parametrize(
    "tags, codec, shape, says",
    [
        (TAGS, Latents(scale=0.5), (3, 2, 2), None),
        (TAGS, None, (3, 2, 2), None),
        (changed(scale=None, encoder_sha256=None), Latents(), (3, 2, 2), None),
        (TAGS, Latents(), (3, 2, 2), "another value of scale: 0.5, not 0.18215"),
        (
            TAGS,
            Latents(scale=0.5),
            (3, 2, 4),
            r"\(3, 2, 2\), from images of 16",
        ),
        (changed(kind="latent"), Latents(scale=0.5), (3, 2, 4), None),
        (changed(encoder_sha256="f" * 64), "other", (3, 2, 2), "encoder .*: ffff"),
    ],
    ids="same no-codec unknown scale shape latent encoder".split(),
)
def test_a_cache_unlike_a_config_is_refused(tmp_path, tags, codec, shape, says):
    write(tmp_path, tags)
    cache = LatentCache(tmp_path)
    codec = toy() if codec == "other" else codec
    if says is None:
        return check_cache(cache, codec, shape)
    with pytest.raises(UserError, match=says) as caught:
        check_cache(cache, codec, shape)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_sources_without_tags_pass():
    check_cache([{"latent": 0}], Latents(), (3, 2, 2))


def test_a_cache_without_flips_is_refused_where_flips_are_wanted(tmp_path):
    write(tmp_path, changed(views=1))
    with pytest.raises(UserError, match="without flips; set flip=False "):
        LatentCache(tmp_path)
    assert not LatentCache(tmp_path, flip=False).flip
    write(tmp_path / "both")
    assert not LatentCache(tmp_path / "both", flip=False).flip


@pytest.mark.parametrize(
    "field, value",
    [
        ("encoder_sha256", "f" * 64),
        ("scale", 0.25),
        ("precision", "bf16"),
        ("views", 1),
        ("size", 32),
        ("crop", "another"),
        ("listing_sha256", "m" * 64),
        ("dtype", "float16"),
        ("shards", 4),
    ],
)
def test_going_on_otherwise_is_refused(tmp_path, field, value):
    open_plan(tmp_path, TAGS)
    assert open_plan(tmp_path, TAGS) == tmp_path
    says = f"another value of .*: {getattr(TAGS, field)}, not {value}; extract into"
    with pytest.raises(UserError, match=says):
        open_plan(tmp_path, changed(**{field: value}))


def test_folders_that_are_no_caches_are_named(tmp_path):
    with pytest.raises(UserError, match=f"no cache.json in {tmp_path}/none; extract_f"):
        LatentCache(tmp_path / "none")
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="holds holiday.jpg and no cache; take another"):
        open_plan(tmp_path, TAGS)
    path = open_plan(tmp_path / "begun", TAGS)
    with pytest.raises(UserError, match="is not finished; run extract_features.py"):
        LatentCache(path)
    assert finish(path, TAGS, []) is None
    (path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="plan.json is not JSON"):
        open_plan(path, TAGS)
    (path / "cache.json").write_text("{")
    with pytest.raises(UserError, match="cache.json is not JSON"):
        LatentCache(path)
    (path / "cache.json").write_text('{"tags": {"colour": 1}}')
    with pytest.raises(UserError, match="another version .*colour.*; extract it again"):
        LatentCache(path)


def spoil_number(file):
    data = bytearray(file.read_bytes())
    at = data.index(moments(4).tobytes())
    data[at + 20 : at + 24] = b"????"
    file.write_bytes(data)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.unlink(),
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:300]),
        lambda file: file.write_bytes(b"?" * 70_000),
        spoil_number,
    ],
    ids="missing empty short other number".split(),
)
def test_damaged_shards_are_named(tmp_path, spoil):
    write(tmp_path)
    cache, file = LatentCache(tmp_path), tmp_path / TAGS.shard(1)[0]
    spoil(file)
    with pytest.raises(UserError, match=f"cannot read {file} .*; remove it") as caught:
        cache[4]
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(cache[10]["moments"], moments(10))  # of another shard
