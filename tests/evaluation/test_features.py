"""Features of images over several devices, in order and once each; stored ones."""

import jax
import numpy as np
import pytest

from sit_jax.convert.inception import InceptionWeights
from sit_jax.errors import UserError
from sit_jax.evaluation.features import (
    FeatureExtractor,
    StoredFeatures,
    inception_pipeline,
    keep_features,
    pipeline_differences,
    write_features,
)
from sit_jax.evaluation.image_sets import batch_starts
from sit_jax.parallel.mesh import make_mesh
from sit_jax.sampling.outputs import ArrayFile


def network(params, images):
    """Features that tell every image from every other."""
    flat = images.reshape(len(images), -1).astype("float32")
    pool = flat @ params["w"]
    return {"pool": pool, "spatial": flat[:, :2], "logits": pool[:, :3] + 1}


def params(width=12):
    return {"w": np.random.default_rng(0).standard_normal((width, 5), np.float32)}


def pictures(count, side=2):
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def extractor(devices=8, batch_size=16, run=network):
    mesh = make_mesh(data=-1, fsdp=1, devices=jax.devices()[:devices])
    return FeatureExtractor(run, params(), mesh, batch_size)


def parts(images, size):
    return (images[start : start + size] for start in batch_starts(len(images), size))


def joined(batches):
    batches = list(batches)
    return {n: np.concatenate([b[n] for b in batches]) for n in batches[0]}


@pytest.mark.parametrize("devices, batch_size", [(1, 5), (8, 16), (4, 6), (8, 1)])
@pytest.mark.parametrize("count", [1, 16, 37])
def test_every_image_once_and_in_order(devices, batch_size, count):
    images = pictures(count)
    run = extractor(devices, batch_size)
    assert run.batch_size % devices == 0 and run.batch_size >= batch_size
    found = joined(run(parts(images, 11)))
    want = network(params(), images)
    for name, array in want.items():
        assert found[name].shape == array.shape
        # products of another number of rows may round differently on a CPU
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-3)


def test_50003_images_over_8_devices_count_once_each():
    count = 50_003
    numbers = np.arange(count, dtype=np.uint32).view(np.uint8).reshape(count, 1, 1, 4)
    back = lambda params, images: {
        "pool": (images[:, 0, 0, :3].astype("float32") * np.float32([[1, 256, 65536]]))
    }
    run = extractor(8, 4096, back)
    found = joined(run(parts(numbers[..., :3], 4096)))["pool"].sum(1)
    np.testing.assert_array_equal(found, np.arange(count))


def test_products_are_float32_on_every_platform():
    images = jax.ShapeDtypeStruct((16, 2, 2, 3), np.uint8)
    text = extractor(1)._run.lower(params(), images).as_text()
    (dot,) = [line for line in text.splitlines() if "dot_general" in line]
    assert dot.count("HIGHEST") == 2


def test_widths_are_known_before_anything_is_computed():
    def never(params, images):
        jax.debug.callback(lambda: pytest.fail("it ran"))
        return network(params, images)

    found = extractor(run=never).widths((2, 2, 3))
    assert found == {"pool": 5, "spatial": 2, "logits": 3}


def test_features_are_kept_and_read_again(tmp_path):
    store, images = {}, pictures(21)
    batches = extractor()(parts(images, 8))
    found = joined(keep_features(batches, 21, store))
    write_features(tmp_path / "f.npz", store, {"pipeline": {"network": "toy"}})
    stored = StoredFeatures(ArrayFile(tmp_path / "f.npz"))
    assert stored.count == 21 and stored.is_inception
    assert stored.pipeline == {"network": "toy"}
    assert stored.widths == {"pool": 5, "spatial": 2, "logits": 3}
    for name, array in joined(stored.batches()).items():
        np.testing.assert_array_equal(array, found[name])


def test_features_of_other_networks_have_their_own_name(tmp_path):
    np.savez(tmp_path / "f.npz", features=np.ones((4, 3), np.float64))
    stored = StoredFeatures(ArrayFile(tmp_path / "f.npz"))
    assert not stored.is_inception and stored.widths == {"pool": 3}
    assert stored.names == ["features"] and stored.pipeline is None


ONES = np.ones((4, 3), np.float32)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": ONES}, "has no array features, only mu"),
        (
            {"pool": ONES.astype(np.int32)},
            r"pool is int32 \[4, 3\]; .* floats \[N, D\]",
        ),
        ({"pool": ONES[0]}, r"pool is float32 \[3\]"),
        ({"pool": ONES, "logits": ONES[:2]}, "4 of pool, 2 of logits"),
        ({"pool": ONES, "record": np.array("no json")}, "its record is no JSON"),
        ({"pool": ONES, "record": np.array("[1]")}, "its record is .* no table"),
    ],
    ids=["name", "integers", "flat", "counts", "json", "table"],
)
def test_files_that_are_no_features_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(UserError, match=message):
        StoredFeatures(ArrayFile(tmp_path / "f.npz"))


def test_features_that_are_no_numbers_are_refused(tmp_path):
    np.savez(tmp_path / "f.npz", pool=np.where(np.eye(4) > 0, np.nan, 1.0))
    with pytest.raises(UserError, match="pool has values that are no number"):
        list(StoredFeatures(ArrayFile(tmp_path / "f.npz")).batches())


def test_pipelines_are_told_apart():
    one = inception_pipeline(InceptionWeights({}, None, "a" * 64, False))
    other = inception_pipeline(InceptionWeights({}, None, "b" * 64, False))
    assert pipeline_differences(one, one) == [] and pipeline_differences(
        one, other
    ) == ["weights"]
    assert pipeline_differences(one, one | {"resize": "half-pixel"}) == ["resize"]
    assert (
        pipeline_differences(one, one | {"library": "another", "precision": "fast"})
        == []
    )
    assert pipeline_differences(None, one) == pipeline_differences(one, None) == []
    both = [{**each, "released": True} for each in (one, other)]
    assert pipeline_differences(*both) == []  # one file, one graph: the same network
