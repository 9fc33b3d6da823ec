"""Digits, synthetic records, arrays in memory and folders of latents."""

import pickle

import jax
import numpy as np
import pytest
from sklearn.datasets import load_digits

from sit_jax.config import build, from_json, spec
from sit_jax.data import Digits, LatentFolder, Synthetic, batches
from sit_jax.data.folders import ImageFolder
from sit_jax.data.loader import read_record
from sit_jax.data.sources import Arrays, ImageTransform, LabelOffset
from sit_jax.errors import UserError
from sit_jax.parallel.mesh import make_mesh

FEATURE, LABEL = "imagenet256_features/0.npy", "imagenet256_labels/0.npy"


@pytest.fixture
def folder(tmp_path):
    """A folder as fast-DiT's extract_features.py leaves it: latents 0, 1, 2 and 10."""
    for part in ("features", "labels"):
        (tmp_path / f"imagenet256_{part}").mkdir()
    for i, name in enumerate(("0", "1", "2", "10")):
        latent = np.arange(24, dtype=np.float32).reshape(1, 4, 2, 3) + 100 * i
        np.save(tmp_path / f"imagenet256_features/{name}.npy", latent)
        np.save(tmp_path / f"imagenet256_labels/{name}.npy", np.array([i], np.int64))
    return tmp_path


def test_digits_are_the_scans_of_scikit_learn_with_their_labels():
    train, test = Digits(), Digits(train=False)
    assert (len(train), len(test)) == (1297, 500)
    assert (train.shape, train.classes) == ((8, 8, 1), 10)
    # 17 grey levels are 15.9375 apart, so they can be read back; no scan occurs twice
    scans = load_digits()
    labels = {
        scan.tobytes(): label
        for scan, label in zip(scans.data, scans.target, strict=True)
    }
    for record in (
        *map(train.__getitem__, range(1297)),
        *map(test.__getitem__, range(500)),
    ):
        assert record["image"].dtype == np.uint8 and record["label"].dtype == np.int32
        levels = np.round(record["image"] / 255 * 16).astype(float)
        assert labels.pop(levels.tobytes()) == record["label"]
    assert not labels


def test_digits_split_is_stratified_and_seeded():
    train, test = Digits(), Digits(train=False)
    counts = np.bincount(test.labels)
    share = counts / (counts + np.bincount(train.labels))
    # 500 of 1,797 from classes of 174..183: a class differs by less than one record
    np.testing.assert_allclose(share, 500 / 1797, atol=1 / 174)
    np.testing.assert_array_equal(test.images, Digits(train=False).images)
    assert not np.array_equal(test.images, Digits(train=False, seed=1).images)


@pytest.mark.parametrize(
    "make, fields, message",
    [
        (Digits, {"held_out": 1797}, "Digits: held_out is 1797; it takes a whole numb"),
        (Synthetic, {"classes": 0}, "Synthetic: classes is 0"),
        (ImageFolder, {"path": "x", "size": 0}, "ImageFolder: size is 0"),
        (ImageFolder, {"path": "x", "max_corrupt_fraction": 1.5}, "from 0 to 1"),
        (LabelOffset, {"source": spec(Synthetic), "after": -1}, "after is -1"),
    ],
)
def test_fields_out_of_range_are_refused_in_configs(make, fields, message):
    with pytest.raises(UserError, match=message):
        build(spec(make, **fields))


def test_stored_names_of_version_0_1_load():
    """A LabelOffset of inverted images and a folder, as 0.1 wrote them."""
    stored = {
        "make": {"name": "sit_jax.data.further.Further"},
        "source": {
            "make": {"name": "sit_jax.data.styles.Styled"},
            "source": {"make": {"name": "sit_jax.data.sources.Digits"}},
            "style": {"name": "sit_jax.data.styles.inverted"},
        },
        "after": 10,
    }
    source = build(from_json(stored, "source"))
    assert isinstance(source, LabelOffset) and source.classes == 20
    np.testing.assert_array_equal(source[0]["image"], 255 - Digits()[0]["image"])
    make = {"name": "sit_jax.data.folders.ImageFolder"}
    stored = {"make": make, "path": "x", "broken_share": 0.25}
    assert from_json(stored, "source").max_corrupt_fraction == 0.25


def test_synthetic_records_follow_from_seed_and_index():
    source = Synthetic((3, 2, 4), classes=7, length=400)
    first = source[5]
    np.testing.assert_array_equal(first["latent"], source[5]["latent"])
    other = Synthetic((3, 2, 4), classes=7, length=400, seed=1)
    assert not np.array_equal(first["latent"], source[6]["latent"])
    for i in (4, 5, 6):  # nor are the records of another seed the same ones shifted
        assert not np.array_equal(first["latent"], other[i]["latent"])
    values = np.stack([source[i]["latent"] for i in range(400)])
    # 9,600 normal values: standard errors 0.010 and 0.007, asserted within 4 of them
    assert abs(values.mean()) < 0.04 and abs(values.std() - 1) < 0.03
    assert values.dtype == np.float32
    assert {int(source[i]["label"]) for i in range(400)} == set(range(7))
    with pytest.raises(IndexError):
        source[400]


def test_latent_folder_reads_what_fast_dit_wrote(folder):
    source = LatentFolder(folder, classes=4)
    assert (len(source), source.shape, source.classes) == (4, (2, 3, 4), 4)
    assert [int(source[i]["label"]) for i in range(4)] == [0, 1, 2, 3]  # 10 after 2
    latent = source[3]["latent"]
    assert latent.shape == (2, 3, 4) and latent.dtype == np.float32
    wanted = np.arange(24, dtype=np.float32).reshape(4, 2, 3) + 300
    for h, w, c in np.ndindex(2, 3, 4):
        assert latent[h, w, c] == wanted[c, h, w]


@pytest.mark.parametrize("dtype, order", [("<f4", "F"), (">f4", "C"), ("<f2", "F")])
def test_latent_folder_reads_all_floats_and_orders(folder, dtype, order):
    source = LatentFolder(folder, classes=4)
    wanted = np.arange(24).reshape(1, 4, 2, 3)
    file = folder / "imagenet256_features" / "1.npy"
    np.save(file, np.asarray(wanted, dtype, order=order))
    np.testing.assert_array_equal(source[1]["latent"], np.moveaxis(wanted[0], 0, -1))
    assert source[1]["latent"].dtype == np.float32


def test_latent_folder_parses_no_python_in_its_threads(folder, monkeypatch):
    source = LatentFolder(folder, classes=4)

    def mismatch(*arguments):  # what Python 3.11 does once in some thousand files
        raise SystemError("AST constructor recursion depth mismatch")

    monkeypatch.setattr("ast.literal_eval", mismatch)
    mesh = make_mesh(devices=jax.devices()[:1])
    with batches(source, 8, 0, mesh) as loader:
        batch = jax.device_get(next(loader))
    np.testing.assert_array_equal(batch["latent"][:, 0, 0, 0], 100 * batch["label"])


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("imagenet256_labels/2.npy", None, r"4 latents and 3 labels; 2\.npy"),
        (FEATURE, b"nothing of the kind", r"cannot read .*features/0\.npy"),
        (FEATURE, b"\x93NUMPY\1\0v\0{'descr'", r"cannot read .*features/0\.npy"),
        (FEATURE, np.array([{"a": 1}], object), r"0\.npy \(no .npy file of numbers"),
        (FEATURE, np.zeros((2, 4, 2, 3), "f4"), r"0\.npy and its label are float32"),
        (FEATURE, np.zeros((1, 4, 2, 3), "i4"), r"0\.npy and its label are int32"),
        (FEATURE, np.zeros((1, 4, 3, 3), "f4"), r"1\.npy is float32 \[2, 3, 4\] inste"),
        (LABEL, np.array([1, 2]), r"features/0\.npy and its label are .*int64 \(2,\)"),
        (LABEL, np.array([4]), r"features/0\.npy has label 4, but there are 4 classes"),
    ],
    ids="pair text header pickle batch dtype size two range".split(),
)
def test_latent_folder_names_what_is_wrong(folder, name, value, message):
    if value is None:
        (folder / name).unlink()
    elif isinstance(value, bytes):
        (folder / name).write_bytes(value)
    else:
        np.save(folder / name, value)
    with pytest.raises(UserError, match=message) as caught:
        source = LatentFolder(folder, classes=4)
        for i in range(4):
            read_record(source, i)
    assert "\n" not in str(caught.value)


def test_latent_folder_without_files_names_other_sources(tmp_path):
    message = "no folder of .npy files at .*imagenet256_features; --config.source.path"
    with pytest.raises(UserError, match=message):
        LatentFolder(tmp_path)


def test_sources_can_be_pickled(folder):
    for source in (Digits(held_out=9), Synthetic((2, 2, 1), 3), LatentFolder(folder)):
        copy = pickle.loads(pickle.dumps(source))
        for name, value in source[2].items():
            np.testing.assert_array_equal(copy[2][name], value)


def test_arrays_are_records():
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 20, 3), np.uint8)
    source = Arrays(images, [2, 0, 1], flip=True)
    assert (len(source), source.shape, source.classes) == (3, (16, 20, 3), 3)
    np.testing.assert_array_equal(source[1]["image"], images[1])
    np.testing.assert_array_equal(source.flipped(1)["image"], images[1][:, ::-1])
    assert source[0]["label"] == 2 and source[0]["label"].dtype == np.int32
    assert source.listing_sha256() == Arrays(images.copy(), [2, 0, 1]).listing_sha256()
    assert source.listing_sha256() != Arrays(images, [2, 1, 1]).listing_sha256()
    with pytest.raises(
        UserError, match=r"images are \[16, 20, 3\], labels \[1\]; give"
    ):
        Arrays(images[0], [0])


def test_label_offset_numbers_classes_after_those_of_the_base():
    images = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    plain = Arrays(images, [2, 0], flip=True)
    source = LabelOffset(plain, after=5)
    assert (len(source), source.classes, source.shape) == (2, 8, (2, 2, 3))
    assert source.flip and source.class_names == ["0", "1", "2"]
    for record in (source[0], source.flipped(0)):
        assert record["label"] == 7 and record["label"].dtype == np.int32
    np.testing.assert_array_equal(source.flipped(1)["image"], images[1][:, ::-1])


def test_image_transform_changes_images_and_keeps_labels():
    plain = Digits()
    source = ImageTransform(plain)
    np.testing.assert_array_equal(source[4]["image"], 255 - plain[4]["image"])
    assert source[4]["label"] == plain[4]["label"] and not source.flip
