"""Images to a cache: the same from one process or more, and after any kill."""

import jax
import numpy as np
import pytest
from helpers import pictures
from helpers.codecs import toy
from helpers.small import called

from sit_jax.cli import extract_features
from sit_jax.data.extract import (
    ExtractOptions,
    describe,
    encode,
    extract,
    make_encoder,
)
from sit_jax.data.folders import ImageFolder
from sit_jax.data.latent_cache import LatentCache
from sit_jax.data.sources import Arrays
from sit_jax.errors import UserError


def images(count=30):
    """Images [8, 12] whose mirror images have other moments."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (count, 8, 12, 3), np.uint8)
    return Arrays(values, np.arange(count) % 5, 5)


def make(path, source=None, codec=None, flip=True, dtype="float32", shards=8, **more):
    source, codec = source or images(), codec or toy()
    metadata = describe(source, codec, dtype, flip, shards)
    options = ExtractOptions(**{"batch_size": 8, "threads": 2} | more)
    return extract(source, codec, path, metadata, options)


def contents(path):
    """-> {name: bytes} of all that makes up a cache."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache of images() by toy()."""
    path = tmp_path_factory.mktemp("cache")
    assert make(path)[0] == 30
    return path


def test_moments_are_the_codecs_of_both_views(made):
    source, codec, cache = images(), toy(), LatentCache(made)
    assert (len(cache), cache.shape, cache.classes) == (30, (2, 3, 4), 5)
    encode = jax.jit(lambda codec, x: codec.encode(x))
    for mirror, record in ((False, cache.__getitem__), (True, cache.flipped)):
        wanted = encode(codec, source.images[:, :, ::-1] if mirror else source.images)
        moments = np.stack([record(i)["moments"] for i in range(30)])
        # the same products of 48 numbers; XLA may add them in another order
        np.testing.assert_allclose(moments, wanted, rtol=1e-5, atol=1e-6)
    assert [int(r["label"]) for r in cache] == source.labels.tolist()
    metadata = cache.metadata
    assert (metadata.scale, metadata.encoder_sha256) == (0.5, "e" * 64)
    assert metadata.precision == "exact"
    assert (metadata.size, metadata.crop, metadata.views) == (8, "ADM centre crop", 2)
    assert metadata.listing_sha256 == source.listing_sha256()


def test_processes_write_what_one_writes(made, tmp_path):
    for process in reversed(range(3)):
        _, about = make(tmp_path, process=process, count=3)
        assert (about is None) == (process > 0)  # the last one finishes it
    assert contents(tmp_path) == contents(made)


class Stopping(Arrays):
    """Stops, as by a kill, when its last image is read."""

    def __getitem__(self, i):
        if i == len(self) - 1:
            raise KeyboardInterrupt
        return super().__getitem__(i)


def test_extract_goes_on_after_a_stop(made, tmp_path):
    whole = images()
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, Stopping(whole.images, whole.labels, 5))
    begun = {name: (tmp_path / name).stat().st_mtime_ns for name in contents(tmp_path)}
    assert 1 < len(begun) < 9 and begun.keys() < contents(made).keys()
    with pytest.raises(UserError, match="has no cache.json"):
        LatentCache(tmp_path)
    counts = []
    done, _ = make(tmp_path, show=lambda images, of: counts.append((images, of)))
    assert 0 < done < 30 and sum(images for images, _ in counts) == done == counts[0][1]
    for name, time in begun.items():
        assert (tmp_path / name).stat().st_mtime_ns == time  # not made again
    assert contents(tmp_path) == contents(made)
    assert make(tmp_path)[0] == 0  # nothing to do


def test_extract_writes_half_floats_of_one_view(made, tmp_path):
    make(tmp_path, dtype="float16", flip=False)
    full, half = LatentCache(made), LatentCache(tmp_path, flip=False)
    for ours, theirs in zip(half, full, strict=True):
        wanted = theirs["moments"]  # half precision: 11 bits
        np.testing.assert_allclose(ours["moments"], wanted, rtol=2**-11, atol=1e-7)


def test_corrupt_images_are_left_out_named_and_counted(tmp_path):
    root = pictures.folder(tmp_path / "images", each=4, size=(8, 8))
    (root / "bee" / "1.png").write_bytes(b"no image")
    lines = []
    source = ImageFolder(root, size=8, max_corrupt_fraction=0.1)
    done, about = make(tmp_path / "out", source, shards=2, say=lines.append)
    cache = LatentCache(tmp_path / "out")
    assert (done, len(cache), about["images"]) == (12, 11, [5, 6])
    assert [int(record["label"]) for record in cache] == [0] * 4 + [1] * 3 + [2] * 4
    assert len(lines) == 1 and "bee/1.png: not an image in one of JPEG" in lines[0]
    assert list(about["broken"]) == ["5"] and "left out" in lines[0]
    source.max_corrupt_fraction = 0.01
    with pytest.raises(UserError, match="1 of 12 images are corrupt, more than max"):
        make(tmp_path / "strict", source, shards=2)


def test_extract_refuses_to_go_on_with_another_vae_or_data(made):
    with pytest.raises(UserError, match="made with encoder_sha256 e"):
        make(made, codec=toy(encoder_sha256="f" * 64))
    with pytest.raises(UserError, match="made with listing_sha256"):
        make(made, images(31))


def test_values_that_are_not_finite_stop_it(tmp_path):
    codec = toy()
    codec = codec.replace(kernel=codec.kernel.at[0, 0].set(np.nan))
    with pytest.raises(UserError, match="moments of record 0 are not finite"):
        make(tmp_path, codec=codec)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 12}, "batch size 12 cannot be split over 8 devices"),
        ({"process": 2, "count": 2}, "process 2 of 2"),
    ],
    ids=["batch", "process"],
)
def test_extract_refuses_wrong_settings(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path / "out", **settings)
    assert not list(tmp_path.glob("out/*record"))


def test_weights_are_arguments_of_one_program():
    source = images()
    tags = describe(source, toy())
    before = encode._cache_size()
    for codec, count in ((toy(), 8), (toy(), 3), (toy(1), 8)):
        assert len(make_encoder(codec, tags, 16)(source.images[:count])) == 2
    assert encode._cache_size() == before + 1
    text = encode.lower(toy(), source.images[:8], False, "float32").as_text()
    assert "tensor<48x4xf32>" in text.split("->")[0]  # the kernel comes in


def script(monkeypatch, capsys, *arguments):
    """Runs extract_features.py with the toy codec in the VAE's place."""
    monkeypatch.setattr(extract_features, "load_codec", lambda vae, precision: toy())
    words = [str(word) for word in arguments]
    return called(extract_features.main, monkeypatch, capsys, *words)


def test_command_reports_and_checks(tmp_path, monkeypatch, capsys):
    root = pictures.folder(tmp_path / "images", size=(8, 8))
    (root / "ant" / "notes.txt").write_text("")
    out = tmp_path / "out"
    words = ("--data", root, "--vae", "x", "--size", 8, "--out", out, "--batch-size", 8)
    code, out_text, errors = script(monkeypatch, capsys, *words)
    assert code == 0, errors
    assert "9 images in 3 classes: ant, bee, cat\n" in out_text
    assert "1 files are left out, as they do not end in .jpg" in out_text
    assert "images/s" in out_text and f"9 images in {out}, 0 corrupt" in out_text
    assert "scaled latents by channel: mean " in out_text
    assert "warning: a standard deviation of 0." in errors  # of a toy's latents
    assert LatentCache(out).class_names == ["ant", "bee", "cat"]
    assert (out / "manifest.json").exists()
    code, out_text, _ = script(monkeypatch, capsys, *words)
    assert code == 0 and "\n0 images in " in out_text


def test_command_imports_fast_dits_folder(tmp_path, monkeypatch, capsys):
    for part, array in (("features", np.ones((1, 4, 2, 2), "f4")), ("labels", [0])):
        (tmp_path / f"imagenet256_{part}").mkdir()
        np.save(tmp_path / f"imagenet256_{part}/0.npy", array)
    words = ("--data", tmp_path, "--kind", "fast-dit", "--classes", 3)
    out = tmp_path / "out"
    code, out_text, _ = script(monkeypatch, capsys, *words, "--out", out)
    assert code == 0 and f"1 latents in {out}" in out_text
    assert len(LatentCache(out)) == 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["--data", "nowhere", "--vae", "x"], "no folder nowhere"),
        (["--data", "x", "--vae", "x", "--process", "1"], "--coordinator, --proc"),
        (["--data", "x", "--kind", "tar", "--vae", "x"], "no file x; put ILSVRC"),
        (["--data", "x", "--kind", "lmdb"], "--kind 'lmdb' (one of"),
    ],
    ids="folder process tar kind".split(),
)
def test_command_names_mistakes(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    code, _, errors = script(monkeypatch, capsys, *words, "--out", tmp_path / "out")
    assert code == 2 and message in errors and errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_command_wants_a_vae(monkeypatch, capsys):
    words = ("--data", "x", "--out", "y")
    code, _, errors = called(extract_features.main, monkeypatch, capsys, *words)
    assert code == 2 and "--vae is missing" in errors
