"""Scripts that share out work among two and four real processes: what one gives.

A minute or two: pytest tests/slow/test_shared_work.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import pictures, processes, small
from PIL import Image

from sit_jax.config import spec
from sit_jax.data.sources import Digits

EXTRACT = """
from sit_jax.cli import extract_features
from helpers.codecs import toy
extract_features.load_codec = lambda vae, precision: toy()
extract_features.main()
"""
EVALUATE = """
from helpers import toy_inception as t
from sit_jax.cli import evaluate
evaluate.get_extractor = lambda name, path, size: t.extractor(t.weights(), None, size)
t.evaluation.MIN_IMAGES = 205
evaluate.main()
"""


def drawn(count, weights, out):
    """Ten images by so many processes; -> where they are."""
    draw = ("sample.py", "--weights", weights, "--num", 10, "--batch-size", 4)
    said = processes.run(count, *draw, "--labels", "random", "--out", out)
    assert "10 images" in said
    assert not list(Path(out).parent.glob("*.parts"))
    return Path(out)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return small.checkpoint(tmp_path_factory.mktemp("weights"), small.config())


@pytest.fixture(scope="module")
def ten(tmp_path_factory, weights):
    """Ten images, by one process."""
    return drawn(1, weights, tmp_path_factory.mktemp("ten") / "x.npz")


def test_ten_images_exactly_once(tmp_path, weights, ten):
    """Bytes of one process: an image follows from the seed and its number."""
    many = drawn(4, weights, tmp_path / "x.npz")
    with np.load(ten) as ours, np.load(many) as theirs:
        assert ours["arr_0"].shape[0] == 10
        assert ours["arr_0"].tobytes() == theirs["arr_0"].tobytes()
        assert ours["arr_1"].tobytes() == theirs["arr_1"].tobytes()
    records = [
        json.loads(path.with_name(f"{path.name}.manifest.json").read_text())
        for path in (ten, many)
    ]
    for name in ("job", "weights_sha256", "batch_size", "stats", "precision", "codec"):
        assert records[0][name] == records[1][name], name
    assert [record["hosts"] for record in records] == [1, 4]


def test_ten_files_exactly_once(tmp_path, weights, ten):
    many = drawn(2, weights, f"{tmp_path}/x/")
    names = sorted(path.name for path in many.glob("*.png"))
    assert names == [f"{i:06d}.png" for i in range(10)]
    with np.load(ten) as whole:
        for name, image in zip(names, whole["arr_0"], strict=True):
            found = np.asarray(Image.open(many / name)).reshape(image.shape)
            np.testing.assert_array_equal(found, image, err_msg=name)


def test_likelihoods_of_two_are_those_of_one(tmp_path):
    """Each process measures some of the batches; the table is the same, to a byte."""
    config = small.config(shape=(8, 8, 1), synthetic=False)
    config.source = spec(Digits)
    config.model.classes = 10
    small.checkpoint(tmp_path / "w", config)
    tables = []
    for number in (1, 2):
        out = tmp_path / f"{number}.csv"
        measure = ("sample.py", "--weights", tmp_path / "w", "--likelihood")
        said = processes.run(
            number, *measure, "--num", 7, "--batch-size", 2, "--out", out
        )
        assert "7 records" in said
        tables.append(out.read_bytes())
    assert tables[0] == tables[1] and tables[0].count(b"\n") == 8


def extracted(count, root, out):
    """60 photographs as a cache, by so many processes; -> {name: bytes}."""
    more = ("--vae", "x", "--size", 8, "--out", out, "--shards", 6, "--batch-size", 8)
    said = processes.run(count, "-c", EXTRACT, "--data", root, *more)
    assert f"\n60 images in {out}, 0 corrupt" in said
    kept = (file for file in out.iterdir() if file.name != "manifest.json")
    return {file.name: file.read_bytes() for file in kept}


def test_extraction_by_many_is_that_by_one(tmp_path):
    root = pictures.folder(tmp_path / "images", each=20, size=(10, 8))
    one, two, four = (extracted(n, root, tmp_path / str(n)) for n in (1, 2, 4))
    assert one == two == four and len(one) == 8


def figures(count, folder):
    """-> those of 211 images, by so many processes."""
    out, kept = folder / f"{count}.json", folder / f"f{count}.npz"
    sides = (folder / "s.npz", "--reference", folder / "r.npz")
    more = ("--out", out, "--save-features", kept, "--batch-size", 16)
    processes.run(count, "-c", EVALUATE, *sides, *more)
    with np.load(kept) as features:
        assert len(features["pool"]) == 211
    found = json.loads(out.read_text())
    assert found["samples"]["images"] == 211
    return found["figures"]


def test_figures_of_many_are_those_of_one(tmp_path):
    """Every image once: 211 of them are no multiple of anything here.

    To 1e-5: features differ by the last bit with the rows on a device.
    """
    rng = np.random.default_rng(0)
    for name, bright in (("s", 256), ("r", 200)):
        image = rng.integers(0, bright, (211, 2, 2, 3)).astype(np.uint8)
        np.savez(tmp_path / name, arr_0=image)
    one, *others = (figures(count, tmp_path) for count in (1, 2, 4))
    for many in others:
        assert many.keys() == one.keys()
        for name, value in one.items():
            np.testing.assert_allclose(many[name], value, rtol=1e-5, err_msg=name)
