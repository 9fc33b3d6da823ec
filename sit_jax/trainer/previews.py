"""Shows during training what the EMA weights draw: sheets of samples and an FID curve.

Both are drawn as sample.py would draw them, from the same noises and labels each time.
FID falls with the number of images, and rises without guidance; within one curve both
stay what they are.
"""

import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, UInt8

from sit_jax.config import build
from sit_jax.convert import inception
from sit_jax.errors import UserError
from sit_jax.evaluation.evaluate import fid_of_images, require_same_pipeline
from sit_jax.evaluation.features import inception_extractor
from sit_jax.evaluation.image_sets import input_of_images, open_input
from sit_jax.evaluation.statistics import FeatureStatistics, collect_statistics
from sit_jax.experiment import Experiment
from sit_jax.parallel import multihost
from sit_jax.planning.programs import with_sampling_precision
from sit_jax.sampling.batch_sampler import BatchSampler
from sit_jax.sampling.grid import captions, image_grid
from sit_jax.sampling.labels import make_labels
from sit_jax.trainer.run_log import RunLog

SHEET_BATCH, FID_BATCH = 32, 64  # images that are drawn together


class Previews:
    """Draws what a step is due for, and logs it.

    Args:
        log: Where the pictures and figures go.
        config: The run's config.
        experiment: What is built from it.
        mesh: The devices; with several processes all draw all images.
        class_names: Names of the classes, where known.
    """

    def __init__(
        self,
        log: RunLog,
        config: Any,
        experiment: Experiment,
        mesh: Mesh,
        class_names: Sequence[str] | None = None,
    ):
        self._log, self._steps = log, config.steps
        self._drawers: list[tuple[int, SampleGrid | FidCurve]] = []  # steps between
        sheets_every = config.sample_every if config.preview else 0
        curve_every = config.get("evaluate_every", 0)
        common = config, experiment, mesh
        for what, every, make in (
            (
                "sheets of samples",
                sheets_every,
                partial(SampleGrid, *common, class_names),
            ),
            ("curve of FIDs", curve_every, partial(FidCurve, *common)),
        ):
            try:
                if every:
                    self._drawers.append((every, make()))
            except UserError as reason:
                log.say(f"no {what}: {reason}")
        possible = [type(drawer).__name__ for _, drawer in self._drawers]
        remedy = "give all hosts the Inception weights"
        multihost.assert_equal("able to draw sheets and FIDs", possible, remedy)

    def draw(self, step: int, ema: Any, is_last: bool = False) -> float:
        """Draws what `step` is due for.

        Args:
            step: The step just done.
            ema: Parameters of the whole network to draw with.
            is_last: The run stops here: nothing is drawn, as it may take minutes.

        Returns:
            Seconds that it took.
        """
        is_due = lambda every: step % every == 0 or step == self._steps
        due = [drawer for every, drawer in self._drawers if is_due(every)]
        if not due:
            return 0.0
        if is_last:
            remedy = "sample.py makes them of it"
            self._log.say(f"no samples of step {step} were drawn; {remedy}")
            return 0.0
        first = time.perf_counter()
        for drawer in due:
            start = time.perf_counter()
            drawer.record(self._log, step, ema)
            seconds = time.perf_counter() - start
            self._log.say(f"{drawer.did} step {step} in {seconds:.1f} s")
        return time.perf_counter() - first


class ImageDrawer:
    """Draws the same images each time, as sample.py would.

    Args:
        config: The run's config.
        experiment: What is built from it.
        mesh: The devices.
        labels: A class for each image.
        batch_size: Images that are drawn together.

    Raises:
        UserError: The codec makes no pictures.
    """

    def __init__(
        self,
        config: Any,
        experiment: Experiment,
        mesh: Mesh,
        labels: Int[np.ndarray, " n"],
        batch_size: int,
    ):
        experiment, wrap = with_sampling_precision(config, experiment)
        self._decode = experiment.codec.decode
        one = jnp.zeros((1, *experiment.shape))
        channels = jax.eval_shape(self._decode, one).shape[-1]
        if channels not in (1, 3):
            raise UserError(f"{channels} channels do not make a picture")
        self._labels, self._seed = labels, config.seed
        self._sampler: BatchSampler | None = None
        size = min(len(labels), batch_size)
        self._compile = lambda params: BatchSampler(
            experiment, params, mesh, size, with_precision=wrap
        )

    def __call__(self, params: Any) -> Iterator[UInt8[np.ndarray, "n h w c"]]:
        """Yields batches of images; the first call compiles."""
        self._sampler = self._sampler or self._compile(params)
        for data, _ in self._sampler(self._seed, self._labels, params=params):
            yield np.asarray(self._decode(data))


class SampleGrid:
    """Draws a sheet of config.preview images, one row a class."""

    did = "drew the samples of"

    def __init__(
        self,
        config: Any,
        experiment: Experiment,
        mesh: Mesh,
        class_names: Sequence[str] | None = None,
    ):
        classes = experiment.model.classes
        self._columns, labels = grid_labels(classes, config.preview)
        names = {str(label): name for label, name in enumerate(class_names or [])}
        self._captions = captions(labels, names)
        self.draw = ImageDrawer(config, experiment, mesh, labels, SHEET_BATCH)

    def __call__(self, params: Any) -> UInt8[np.ndarray, "h w c"]:
        """Returns the picture."""
        images = np.concatenate(list(self.draw(params)))
        return image_grid(images, self._columns, captions=self._captions)

    def record(self, log: RunLog, step: int, params: Any) -> None:
        """Logs the picture."""
        log.image(step, "samples", self(params))


def grid_labels(num_classes: int, count: int) -> tuple[int, Int[np.ndarray, " n"]]:
    """Returns columns and at most `count` labels of a sheet with one class a row.

    With more classes than images it is about square, and classes are spread over all.
    """
    if count >= num_classes:
        columns = count // num_classes
        return columns, np.repeat(np.arange(num_classes), columns)
    labels = np.arange(count) * num_classes // count
    return max(round(count**0.5), 1), labels


class FidCurve:
    """Computes FID-k of always the same k noises and labels, each class as often.

    Raises:
        UserError: The codec makes no pictures, the weights for the features are not
            there, or the reference has other features.
    """

    did = "judged"

    def __init__(self, config: Any, experiment: Experiment, mesh: Mesh):
        count, classes = config.evaluate_images, experiment.model.classes
        labels = make_labels("balanced", count, classes, config.seed)
        self._draw = ImageDrawer(config, experiment, mesh, labels, FID_BATCH)
        self._extractor = build(config.features)
        if self._extractor is None:
            weights = inception.load_inception()
            self._extractor = inception_extractor(weights, mesh, FID_BATCH)
        self._reference = _load_reference(build(config.reference), self._extractor)
        require_same_pipeline(self._extractor.pipeline, self._reference.pipeline)
        self._name = f"{'fid' if self._reference.is_inception else 'frechet'}_{count}"

    def record(self, log: RunLog, step: int, params: Any) -> None:
        """Logs the distance."""
        images = map(_to_rgb, self._draw(params))
        distance = fid_of_images(images, self._extractor, self._reference)
        log.scalars(step, {self._name: distance})


class SourceImages:
    """The images of a data source, as a set of image_sets.py."""

    def __init__(self, source: Any):
        self.path, self._source = type(source).__name__, source

    def __len__(self) -> int:
        return len(self._source)

    def batches(
        self, size: int, numbers: None = None
    ) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
        """Yields all images, in order."""
        for start in range(0, len(self), size):
            rows = range(start, min(start + size, len(self)))
            yield _to_rgb(np.stack([self._source[i]["image"] for i in rows]))


def _load_reference(reference: Any, extractor: Any) -> FeatureStatistics:
    """Returns the statistics of a file, of images in a file, or of a data source."""
    is_file = isinstance(reference, str)
    side = (
        open_input(reference) if is_file else input_of_images(SourceImages(reference))
    )
    if side.statistics is not None:
        return side.statistics
    source = side.source(extractor)
    return collect_statistics(
        source.batches(),
        source.count,
        keep=0,
        pipeline=source.pipeline,
        is_inception=source.is_inception,
    )


def _to_rgb(images: np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
    return np.broadcast_to(images, (*images.shape[:3], 3))
