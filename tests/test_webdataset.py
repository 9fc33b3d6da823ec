"""Tars of samples: their order, their labels, and what is wrong with them."""

import numpy as np
import pytest
from photographs import pixels, png
from tar_files import tar

from sit_jax.data.archives import WebdatasetTars
from sit_jax.data.images import center_crop, rgb
from sit_jax.errors import UserError


def samples(count, start=0, label="cls"):
    """Files of webdataset samples, each an image and a label."""
    files = {}
    for i in range(start, start + count):
        files[f"{i:04d}.jpg"] = png(i)
        said = b"%d\n" % (i % 3) if label == "cls" else b'{"label": %d}' % (i % 3)
        files[f"{i:04d}.{label}"] = said
    return files


@pytest.mark.parametrize("label", ["cls", "json"])
def test_webdataset_tars_are_read_in_order(tmp_path, label):
    (tmp_path / "b.tar").write_bytes(tar(samples(2, 3, label)))
    (tmp_path / "a.tar").write_bytes(tar(samples(3, 0, label)))
    (tmp_path / "readme.txt").write_text("nothing")
    source = WebdatasetTars(tmp_path, 12, classes=3)
    assert (len(source), source.classes, source.shape) == (5, 3, (12, 12, 3))
    for i, record in enumerate(source):
        wanted = center_crop(rgb(pixels(i)), 12)
        np.testing.assert_array_equal(record["image"], wanted)
        assert record["label"] == i % 3
    assert source.name(3) == f"{tmp_path}/b.tar:0003.jpg"


def test_webdataset_labels_may_come_first_and_elsewhere_in_json(tmp_path):
    files = {
        "x/7.json": b'{"meta": 1, "cls": 2}',
        "x/7.meta.txt": b"",
        "x/7.jpg": png(0),
    }
    (tmp_path / "a.tar").write_bytes(tar(files))
    source = WebdatasetTars(tmp_path, 12, classes=3, field="cls")
    assert [int(r["label"]) for r in source] == [2]


@pytest.mark.parametrize(
    "files, says",
    [
        ({"0.jpg": b"x"}, r"a\.tar: 0 has no label \(.cls or .json\)"),
        ({"0.cls": b"1", "1.jpg": b"x", "1.cls": b"1"}, r"a\.tar: 0 has no image"),
        ({"0.cls": b"1"}, r"no images in .*a\.tar"),
        ({"0.jpg": b"x", "0.png": b"x", "0.cls": b"1"}, "two images for the key 0"),
        ({"0.jpg": b"x", "0.cls": b"dog"}, r"0\.cls does not hold a number"),
        (
            {"0.jpg": b"x", "0.json": b"[]"},
            "does not hold a number at 'label'",
        ),
        ({"0.jpg": b"x", "0.json": b'{"label": true}'}, "does not hold a number"),
        ({"0.jpg": b"x", "0.json": b"{"}, "does not hold a number"),
        (
            {"0.jpg": b"x", "0.cls": b"3"},
            "has label 3, but there are 3 classes",
        ),
        ({"../0.jpg": b"x", "0.cls": b"1"}, "leads out of the tar"),
    ],
    ids="unlabelled imageless no-images two word list bool torn range climbing".split(),
)
def test_wrong_webdataset_tars_are_refused(tmp_path, files, says):
    (tmp_path / "a.tar").write_bytes(tar(files))
    with pytest.raises(UserError, match=says):
        WebdatasetTars(tmp_path, 12, classes=3)


def test_a_folder_without_tars_is_named(tmp_path):
    with pytest.raises(UserError, match=f"no .tar files in {tmp_path}; --kind"):
        WebdatasetTars(tmp_path)
