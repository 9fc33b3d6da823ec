"""Features of images, by a network that is split over all devices, and stored ones.

A batch of features is {"pool": [n, D], "spatial": [n, S], "logits": [n, K]} float32, of
which all but "pool" may be absent. Features from elsewhere (DINOv2's, say) are "pool"
of any width, alone.
"""

import dataclasses
import json
from collections.abc import Callable

import jax
import numpy as np

from sit_jax.errors import UserError
from sit_jax.files import atomic_write, parse_json
from sit_jax.models.inception import NAME, RESIZE, Inception, preprocess
from sit_jax.parallel.mesh import batch_sharding, device_put_global, replicated
from sit_jax.precision import policy

PARTS = ("pool", "spatial", "logits")
ROWS = 4096  # of stored features that are read together
INCEPTION = {
    "network": NAME,
    "resize": RESIZE,
    "spatial": "mixed_6/conv, 7 channels; row, column, channel",
    "precision": policy.EXACT.name,
}
SAME = ("network", "weights", "resize", "spatial")  # or features are not comparable


@dataclasses.dataclass
class Extractor:
    """network(params, images uint8 [B, H, W, 3]) -> features, run in batches.

    params are handed to the compiled network, whole on every device; images are split
    over the mesh. batch_size is rounded up to a multiple of the devices. pipeline says
    what makes the features, for the records. On several hosts all of them read the same
    images and get all features.
    """

    network: Callable
    params: dict
    mesh: jax.sharding.Mesh
    batch_size: int = 64
    pipeline: dict | None = None

    def __post_init__(self):
        size = self.mesh.size
        self.batch_size = -(-self.batch_size // size) * size
        self.params = device_put_global(self.params, replicated(self.mesh))
        self._split, all_of_it = batch_sharding(self.mesh), replicated(self.mesh)
        run = policy.with_precision(policy.EXACT, self.network)
        self._run = jax.jit(run, out_shardings=all_of_it)

    def __call__(self, batches):
        """batches: iterable of uint8 [n, H, W, 3] of any n -> yields their features.

        A batch is filled up with its last image, whose repetitions are dropped. The
        next images are read while the devices work on these.
        """
        ahead = None
        for images in batches:
            for start in range(0, len(images), self.batch_size):
                part = images[start : start + self.batch_size]
                running = (len(part), self._run(self.params, self._placed(part)))
                if ahead is not None:
                    yield _fetched(*ahead)
                ahead = running
        if ahead is not None:
            yield _fetched(*ahead)

    def widths(self, shape):
        """Numbers in the features of images [H, W, 3], by name; nothing is computed."""
        images = jax.ShapeDtypeStruct((self.batch_size, *shape), np.uint8)
        found = jax.eval_shape(self._run, self.params, images)
        return {name: part.shape[1] for name, part in found.items()}

    def _placed(self, images):
        missing = self.batch_size - len(images)
        if missing:
            images = np.concatenate([images, images[-1:].repeat(missing, 0)])
        read = lambda index: np.ascontiguousarray(images[index])
        return jax.make_array_from_callback(images.shape, self._split, read)


def inception_extractor(weights, mesh, batch_size=64):
    """-> Extractor of the 2015 network; weights: inception.load_inception()."""
    return Extractor(
        lambda params, images: Inception().apply(
            {"params": params}, preprocess(images)
        ),
        weights.params,
        mesh,
        batch_size,
        pipeline(weights),
    )


def pipeline(weights):
    """What a record says of features by the 2015 network with these weights."""
    made = {"library": "sit_jax", "weights": weights.sha256}
    return INCEPTION | made | {"released": weights.is_published}


def unlike(one, other):
    """-> the names in which two pipelines differ; of an unknown one (None) none."""
    if one is None or other is None:
        return []
    both_released = one.get("released") and other.get("released")
    names = [n for n in SAME if n != "weights" or not both_released]
    return [name for name in names if one.get(name) != other.get(name)]


class StoredFeatures:
    """Features in an .npz: "pool" [N, D], and "spatial", "logits" if they are there.

    Other networks' are called "features" in the file, and are no Inception's.
    """

    def __init__(self, file):
        self.path, self.is_inception = file.path, "pool" in file
        if not self.is_inception and "features" not in file:
            held = ", ".join(file.names) or "nothing"
            raise UserError(f"{file.path} has neither pool nor features, only {held}")
        names = PARTS if self.is_inception else ("features",)
        self._members = {
            "pool" if name == "features" else name: file.member(name)
            for name in names
            if name in file
        }
        for name, member in self._members.items():
            if len(member.shape) != 2 or member.dtype.kind != "f":
                raise UserError(
                    f"{self.path}: {name} is {member.dtype} {list(member.shape)}; "
                    "features are floats [N, D]"
                )
        counts = {name: len(member) for name, member in self._members.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{n} of {name}" for name, n in counts.items())
            raise UserError(f"{self.path} has {listed}; they belong to other images")
        self.pipeline = read_record(file).get("pipeline")

    def __len__(self):
        return len(self._members["pool"])

    @property
    def names(self):
        """Of its arrays, in the file."""
        return [member.name for member in self._members.values()]

    def widths(self):
        """Numbers in a feature, by name."""
        return {name: member.shape[1] for name, member in self._members.items()}

    def __iter__(self):
        """Yields batches of features."""
        parts = [member.parts(ROWS) for member in self._members.values()]
        for arrays in zip(*parts, strict=True):
            for name, array in zip(self._members, arrays, strict=True):
                if not np.isfinite(array).all():
                    raise UserError(
                        f"{self.path}: {name} has values that are no number"
                    )
            yield dict(zip(self._members, arrays, strict=True))


def remembered(batches, count, store):
    """Yields batches of features, and keeps them in the dict store: {name: [N, D]}."""
    start = 0
    for batch in batches:
        for name, part in batch.items():
            whole = store.setdefault(name, np.empty((count, part.shape[1]), np.float32))
            whole[start : start + len(part)] = part
        start += len(batch["pool"])
        yield batch


def write_features(path, features, record):
    """features: {name: [N, D]}; record: what is known of them, {"pipeline": ...}."""
    with atomic_write(path) as name:
        np.savez(name, **features, record=np.array(json.dumps(record)))


def read_record(file):
    """-> the record in an ArrayFile, {} without one."""
    if "record" not in file:
        return {}
    try:
        found = parse_json(str(file.array("record")))
    except ValueError as error:
        raise UserError(f"{file.path}: its record is no JSON") from error
    if not isinstance(found, dict):
        raise UserError(f"{file.path}: its record is {found!r}, no table")
    return found


def _fetched(count, features):
    return {name: np.asarray(array)[:count] for name, array in features.items()}
