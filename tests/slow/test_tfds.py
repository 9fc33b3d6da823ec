"""A data set that the real tensorflow-datasets prepares here, without TensorFlow.

Seconds: pip install -r requirements-slow.txt, pytest tests/slow/test_tfds.py
"""

import contextlib
import io
import sys
from functools import partial

import grain
import numpy as np
import pytest
from helpers import pictures

from sit_jax.data.archives import Tfds
from sit_jax.data.loader import prefetch, read_records
from sit_jax.errors import UserError

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to mend
IMAGES = 6


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    tfds = pytest.importorskip("tensorflow_datasets")

    class Pets(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            image = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
            label = tfds.features.ClassLabel(names=["cat", "dog"])
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, downloads):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(IMAGES):
                yield i, {"image": io.BytesIO(pictures.png(i)), "label": i % 2}

    folder = str(tmp_path_factory.mktemp("tfds"))
    Pets(data_dir=folder, file_format="array_record").download_and_prepare()
    assert "tensorflow" not in sys.modules
    return folder


def test_its_images_are_those_that_went_in(prepared):
    source = Tfds("pets", size=16, data_dir=prepared)
    assert len(source) == IMAGES and source.class_names == ["cat", "dog"]
    found = set()
    for record in source:
        same = lambda i: np.array_equal(record["image"], pictures.pixels(i)[:, 2:18])  # noqa: B023
        (i,) = filter(same, range(IMAGES))
        assert record["label"] == i % 2
        found.add(i)
    assert found == set(range(IMAGES))  # shuffled, none twice


def test_copies_in_other_processes_read_the_same(prepared):
    source = Tfds("pets", size=16, data_dir=prepared)
    read = partial(read_records, source, flips=[True])
    steps = grain.MapDataset.source([[i] for i in range(IMAGES)]).map(read)
    with contextlib.closing(prefetch(steps, 1, workers=2)) as records:
        for i in range(IMAGES):
            rows, corrupt = next(records)
            assert not corrupt
            np.testing.assert_array_equal(rows["image"][0], source.flipped(i)["image"])


def test_what_is_not_prepared_is_one_line(prepared):
    with pytest.raises(UserError, match="tfds cannot read 'cats'.*array_record"):
        Tfds("cats", data_dir=prepared)
    with pytest.raises(UserError, match=r"'pets', split 'test'.*Unknown split 'test'"):
        Tfds("pets", "test", data_dir=prepared)
