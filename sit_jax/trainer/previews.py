"""Shows during training what the EMA weights draw: sheets of samples and an FID curve.

Both are drawn as sample.py would draw them, from the same noises and labels each time.
FID falls with the number of images, and rises without guidance; within one curve both
stay what they are.
"""

import time
from collections.abc import Iterator, Sequence
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
from sit_jax.evaluation.image_sets import open_input
from sit_jax.evaluation.statistics import FeatureStatistics, collect_statistics
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
        experiment: Any,
        mesh: Mesh,
        class_names: Sequence[str] | None = None,
    ):
        self._log, self._steps = log, config.steps
        self._grid: SampleGrid | None = None
        self._curve: FidCurve | None = None
        self._grid_every = config.sample_every if config.preview else 0
        self._curve_every = config.get("evaluate_every", 0)
        try:
            if self._grid_every:
                self._grid = SampleGrid(config, experiment, mesh, class_names)
        except UserError as reason:
            log.say(f"no sheets of samples: {reason}")
        try:
            if self._curve_every:
                self._curve = FidCurve(config, experiment, mesh)
        except UserError as reason:
            log.say(f"no curve of FIDs: {reason}")
        possible = [self._grid is not None, self._curve is not None]
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
        is_due = lambda every: every and (step % every == 0 or step == self._steps)
        grid = self._grid if is_due(self._grid_every) else None
        curve = self._curve if is_due(self._curve_every) else None
        if is_last and (grid or curve):
            later = "a run that goes on does"
            later = "sample.py makes them of it" if step == self._steps else later
            self._log.say(f"no samples of step {step} were drawn; {later}")
            return 0.0
        times = [time.perf_counter()]
        if grid:
            self._log.image(step, "samples", grid(ema))
            times.append(time.perf_counter())
            seconds = times[-1] - times[-2]
            self._log.say(f"drew the samples of step {step} in {seconds:.1f} s")
        if curve:
            self._log.scalars(step, {curve.name: curve(ema)})
            times.append(time.perf_counter())
            self._log.say(f"judged step {step} in {times[-1] - times[-2]:.1f} s")
        return times[-1] - times[0]

    def draw_missing(self, step: int, ema: Any) -> None:
        """Draws what the step that a run resumes from was due for, if it has no sheet.

        A stop leaves it out, and a kill may have come before it.
        """
        if self._grid and step and step % self._grid_every == 0:
            if not multihost.broadcast(self._log.has_image(step, "samples")):
                self.draw(step, ema)


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
        experiment: Any,
        mesh: Mesh,
        labels: Int[np.ndarray, " n"],
        batch_size: int,
    ):
        self._experiment, wrap = with_sampling_precision(config, experiment)
        one = jnp.zeros((1, *experiment.shape))
        channels = jax.eval_shape(experiment.codec.decode, one).shape[-1]
        if channels not in (1, 3):
            raise UserError(f"{channels} channels do not make a picture")
        size, self._generator = min(len(labels), batch_size), None
        self._labels, self._seed = labels, config.seed
        self._compile = lambda params: BatchSampler(
            self._experiment, params, mesh, size, with_precision=wrap
        )

    def __call__(self, params: Any) -> Iterator[UInt8[np.ndarray, "n h w c"]]:
        """Yields batches of images; the first call compiles."""
        self._generator = self._generator or self._compile(params)
        for data, _ in self._generator(self._seed, self._labels, params=params):
            yield np.asarray(self._experiment.codec.decode(data))


class SampleGrid:
    """Draws a sheet of config.preview images, one row a class."""

    def __init__(
        self,
        config: Any,
        experiment: Any,
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

    def __init__(self, config: Any, experiment: Any, mesh: Mesh):
        count, classes = config.evaluate_images, experiment.model.classes
        labels = make_labels("balanced", count, classes, config.seed)
        self._draw = ImageDrawer(config, experiment, mesh, labels, FID_BATCH)
        self._extractor = build(config.features)
        is_inception = self._extractor is None
        if is_inception:
            weights = inception.load_inception()
            self._extractor = inception_extractor(weights, mesh, FID_BATCH)
        reference = build(config.reference)
        reference = _load_reference(reference, self._extractor, is_inception)
        require_same_pipeline(self._extractor.pipeline, reference.pipeline)
        self._reference = reference
        self.name = f"{'fid' if reference.is_inception else 'frechet'}_{count}"

    def __call__(self, params: Any) -> float:
        """Returns the distance."""
        images = map(_to_rgb, self._draw(params))
        return fid_of_images(images, self._extractor, self._reference)


def _load_reference(
    reference: Any, extractor: Any, is_inception: bool
) -> FeatureStatistics:
    """Returns the statistics of a file, of images in a file, or of a data source."""
    pipeline = extractor.pipeline
    if not isinstance(reference, str):
        count = len(reference)
        features = extractor(_read_images(reference, extractor.batch_size))
    else:
        side = open_input(reference)
        if side.statistics is not None:
            return side.statistics
        source = side.source(extractor)
        features, count, pipeline = source.batches(), source.count, source.pipeline
        is_inception = source.is_inception
    return collect_statistics(
        features, count, keep=0, pipeline=pipeline, is_inception=is_inception
    )


def _read_images(source: Any, batch_size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(source), batch_size):
        rows = range(start, min(start + batch_size, len(source)))
        yield _to_rgb(np.stack([source[i]["image"] for i in rows]))


def _to_rgb(images: np.ndarray) -> UInt8[np.ndarray, "n h w 3"]:
    return np.broadcast_to(images, (*images.shape[:3], 3))
