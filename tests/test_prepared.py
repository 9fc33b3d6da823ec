"""Sets prepared by TensorFlow Datasets, with a stand-in for it."""

import sys
import types

import numpy as np
import pytest
from photographs import pixels, png

from sit_jax.data.prepared import Tfds
from sit_jax.errors import UserError


class Prepared(list):
    """What tfds.data_source returns, as far as it is used."""

    features = {"label": types.SimpleNamespace(names=["cat", "dog"], num_classes=2)}
    dataset_info = types.SimpleNamespace(full_name="pets/1.0.0", features=features)


def tfds(monkeypatch, data_source):
    """Puts a stand-in for tensorflow_datasets where imports find it."""
    module = types.ModuleType("tensorflow_datasets")
    module.decode = types.SimpleNamespace(SkipDecoding=lambda: "bytes, please")
    module.data_source = data_source
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)


def test_tfds_is_read_through_its_data_source(monkeypatch):
    asked = []
    records = [
        {"image": png(0), "label": np.int64(1)},
        {"image": pixels(1), "label": np.int64(0)},  # of a version that decodes anyway
    ]

    def data_source(name, **settings):
        asked.append((name, settings))
        return Prepared(records)

    tfds(monkeypatch, data_source)
    source = Tfds("pets", "test", 16, data_dir="there")
    decoders = {"image": "bytes, please"}
    wanted = {"split": "test", "data_dir": "there", "download": False}
    assert asked == [("pets", wanted | {"decoders": decoders})]
    assert (len(source), source.shape, source.classes) == (2, (16, 16, 3), 2)
    assert source.class_names == ["cat", "dog"] and source.flip
    for i in range(2):
        image = source[i]["image"]
        np.testing.assert_array_equal(image, pixels(i)[:, 2:18])  # already 16 high
        np.testing.assert_array_equal(source.mirrored(i)["image"], image[:, ::-1])
    assert [int(r["label"]) for r in source] == [1, 0]
    assert source.name(1) == "pets/1.0.0/test[1]" and len(source.listing()) == 64
    assert source.__getstate__()["_opened"] is None  # a copy opens its own files


def raising(error):
    def data_source(name, **settings):
        raise error

    return data_source


@pytest.mark.parametrize(
    "error, says",
    [
        (AssertionError("could not find data\nin"), "preparing it needs TensorFlow"),
        (
            NotImplementedError("random access"),
            "prepared as array_record in its ",
        ),
        (
            ImportError("no", name="tensorflow.io"),
            "needs tensorflow: pip install",
        ),
        (ImportError("no", name="importlib_resources"), "install importlib-resources;"),
    ],
    ids=["unprepared", "format", "tensorflow", "resources"],
)
def test_tfds_says_in_one_line_what_is_missing(monkeypatch, error, says):
    tfds(monkeypatch, raising(error))
    with pytest.raises(UserError, match=says) as caught:
        Tfds("imagenet2012")
    assert "ImageNetTar or ImageFolder" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tfds_itself_may_be_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="pip install tensorflow-datasets"):
        Tfds("imagenet2012")
