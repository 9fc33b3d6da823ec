"""Features of images, made by a network that is split over all devices, or stored.

A batch of features is {"pool": [n, D], "spatial": [n, S], "logits": [n, K]} float32, of
which all but "pool" may be absent. Features from elsewhere (DINOv2's, say) are "pool"
of any width, alone.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from sit_jax.convert import inception
from sit_jax.errors import UserError
from sit_jax.evaluation import digits
from sit_jax.files import atomic_write, parse_json
from sit_jax.models.inception import NAME, RESIZE, Inception, preprocess
from sit_jax.parallel.mesh import (
    batch_sharding,
    device_put_global,
    make_mesh,
    replicated,
)
from sit_jax.precision import policy
from sit_jax.sampling.outputs import ArrayFile

PARTS = ("pool", "spatial", "logits")
ROWS = 4096  # of stored features that are read together
NETWORKS = ("inception", "digits")  # for the command line
INCEPTION = {
    "network": NAME,
    "resize": RESIZE,
    "spatial": "mixed_6/conv, 7 channels; row, column, channel",
    "precision": policy.EXACT.name,
}
COMPARED = ("network", "weights", "resize", "spatial")  # must agree between two sides

Batch = dict[str, Float[np.ndarray, "n _"]]
Pipeline = dict[str, Any]


@dataclasses.dataclass
class FeatureExtractor:
    """Runs a network on batches of images, split over a mesh.

    On several hosts all of them read the same images and get all features.

    Attributes:
      network: (params, images uint8 [B, H, W, 3]) -> features.
      params: handed to the compiled network, whole on every device.
      mesh: devices that the images are split over.
      batch_size: rounded up to a multiple of the devices.
      pipeline: what makes the features, for the records.
    """

    network: Callable
    params: dict
    mesh: jax.sharding.Mesh
    batch_size: int = 64
    pipeline: Pipeline | None = None
    is_inception: bool = True

    def __post_init__(self):
        size = self.mesh.size
        self.batch_size = -(-self.batch_size // size) * size
        self.params = device_put_global(self.params, replicated(self.mesh))
        self._split, whole = batch_sharding(self.mesh), replicated(self.mesh)
        run = policy.with_precision(policy.EXACT, self.network)
        self._run = jax.jit(run, out_shardings=whole)

    def __call__(
        self, batches: Iterable[UInt8[np.ndarray, "n h w 3"]]
    ) -> Iterator[Batch]:
        """Yields the features of batches of any size.

        A batch is padded with its last image, whose repetitions are dropped. The next
        images are read while the devices work on these.
        """
        running = None
        for images in batches:
            for start in range(0, len(images), self.batch_size):
                part = images[start : start + self.batch_size]
                started = (len(part), self._run(self.params, self._place(part)))
                if running is not None:
                    yield _fetch(*running)
                running = started
        if running is not None:
            yield _fetch(*running)

    def widths(self, shape: tuple[int, int, int]) -> dict[str, int]:
        """Returns how many numbers the features of images [H, W, 3] have, by name."""
        images = jax.ShapeDtypeStruct((self.batch_size, *shape), np.uint8)
        shapes = jax.eval_shape(self._run, self.params, images)
        return {name: part.shape[1] for name, part in shapes.items()}

    def _place(self, images):
        padding = self.batch_size - len(images)
        if padding:
            images = np.concatenate([images, images[-1:].repeat(padding, 0)])
        rows = lambda index: np.ascontiguousarray(images[index])
        return jax.make_array_from_callback(images.shape, self._split, rows)


def inception_extractor(
    weights: inception.InceptionWeights, mesh: jax.sharding.Mesh, batch_size: int = 64
) -> FeatureExtractor:
    """Returns the extractor of the 2015 Inception network."""

    def network(params, images):
        return Inception().apply({"params": params}, preprocess(images))

    pipeline = inception_pipeline(weights)
    return FeatureExtractor(network, weights.params, mesh, batch_size, pipeline)


@functools.cache  # it compiles
def get_extractor(
    name: str, weights: str | None = None, batch_size: int = 64
) -> FeatureExtractor | digits.DigitFeatures:
    """Returns an extractor by its name on the command line.

    Args:
      name: one of NETWORKS.
      weights: path of Inception's weights; None looks where they are kept.
      batch_size: images that go through the network together.
    """
    if name == "digits":
        return digits.DigitFeatures()
    loaded = inception.load_inception(weights)
    return inception_extractor(loaded, make_mesh(data=-1, fsdp=1), batch_size)


def inception_pipeline(weights: inception.InceptionWeights) -> Pipeline:
    """Returns what a record says of features by the 2015 network with these weights."""
    made = {"library": "sit_jax", "weights": weights.sha256}
    return INCEPTION | made | {"released": weights.is_published}


def pipeline_differences(one: Pipeline | None, other: Pipeline | None) -> list[str]:
    """Returns the names in which two pipelines differ; none if one is unknown."""
    if one is None or other is None:
        return []
    both_released = one.get("released") and other.get("released")
    names = [n for n in COMPARED if n != "weights" or not both_released]
    return [name for name in names if one.get(name) != other.get(name)]


class ExtractedFeatures:
    """Features that a network makes of an image set.

    Args:
      images: see image_sets.ImageSet.
      extractor: the network.
    """

    def __init__(self, images: Any, extractor: FeatureExtractor):
        self.images, self.extractor, self.count = images, extractor, len(images)
        self.is_inception, self.pipeline = extractor.is_inception, extractor.pipeline

    @property
    def widths(self) -> dict[str, int]:
        """How many numbers the features have, by name."""
        return self.extractor.widths(self.images.shape)

    def batches(self, numbers: Iterable[int] | None = None) -> Iterator[Batch]:
        """Yields batches of features: all, or those with the given numbers."""
        return self.extractor(self.images.batches(self.extractor.batch_size, numbers))


class StoredFeatures:
    """Features in an .npz: "pool" [N, D], and "spatial", "logits" if they are there.

    Those of another network than Inception are called "features" in the file.

    Args:
      file: an opened .npz.

    Attributes:
      widths: how many numbers the features have, by name.
    """

    def __init__(self, file: ArrayFile):
        self.path, self.is_inception = file.path, "pool" in file
        self.names = [name for name in PARTS if name in file]
        if not self.is_inception:
            self.names = ["features"]
        self._members = [file.member(name) for name in self.names]
        for member in self._members:
            if len(member.shape) != 2 or member.dtype.kind != "f":
                raise UserError(
                    f"{self.path}: {member.name} is {member.dtype} "
                    f"{list(member.shape)}; features are floats [N, D]"
                )
        parts = ["pool", *self.names[1:]]
        counts, widths = zip(*(member.shape for member in self._members), strict=True)
        self.count, self.widths = counts[0], dict(zip(parts, widths, strict=True))
        if len(set(counts)) > 1:
            listed = ", ".join(map("{} of {}".format, counts, self.names))
            raise UserError(f"{self.path} has {listed}; they belong to other images")
        self.pipeline = read_record(file).get("pipeline")

    def batches(self) -> Iterator[Batch]:
        """Yields batches of features."""
        readers = [member.batches(ROWS) for member in self._members]
        for arrays in zip(*readers, strict=True):
            for name, array in zip(self.names, arrays, strict=True):
                if not np.isfinite(array).all():
                    raise UserError(
                        f"{self.path}: {name} has values that are no number"
                    )
            yield dict(zip(self.widths, arrays, strict=True))


def keep_features(
    batches: Iterable[Batch], count: int, store: dict[str, np.ndarray]
) -> Iterator[Batch]:
    """Yields batches of features, and puts all of them into store, by name."""
    start = 0
    for batch in batches:
        for name, part in batch.items():
            whole = store.setdefault(name, np.empty((count, part.shape[1]), np.float32))
            whole[start : start + len(part)] = part
        start += len(batch["pool"])
        yield batch


def write_features(path, features: Batch, record: dict[str, Any]) -> None:
    """Writes features with what is known of them, such as their pipeline."""
    with atomic_write(path) as name:
        np.savez(name, **features, record=np.array(json.dumps(record)))


def read_record(file) -> dict[str, Any]:
    """Returns the record in an opened .npz, or {} if there is none."""
    if "record" not in file:
        return {}
    try:
        record = parse_json(str(file.array("record")))
    except ValueError as error:
        raise UserError(f"{file.path}: its record is no JSON") from error
    if not isinstance(record, dict):
        raise UserError(f"{file.path}: its record is {record!r}, no table")
    return record


def _fetch(count, features):
    return {name: np.asarray(array)[:count] for name, array in features.items()}
