"""Compares images with a reference: ADM's five figures, KID, and an interval of FID.

FID is Heusel et al. arXiv:1706.08500, sFID Nash et al. arXiv:2103.03841, both with the
conventions of the evaluator in openai/guided-diffusion that published figures of ADM,
DiT, SiT and MDT come from.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from sit_jax import files
from sit_jax.errors import UserError
from sit_jax.evaluation import fid
from sit_jax.evaluation.features import (
    Batch,
    ExtractedFeatures,
    FeatureExtractor,
    Pipeline,
    keep_features,
    pipeline_differences,
    write_features,
)
from sit_jax.evaluation.fid import Gaussian, RunningMoments, frechet_distance
from sit_jax.evaluation.image_sets import Contents, EvaluationInput, open_input
from sit_jax.evaluation.metrics import Progress, kernel_distance, precision_recall
from sit_jax.evaluation.statistics import FeatureStatistics, collect_statistics
from sit_jax.files import AnyPath, PathLike
from sit_jax.manifest import environment
from sit_jax.parallel import multihost
from sit_jax.sampling import partial_results
from sit_jax.sampling.outputs import ArrayFile, manifest_path

ADM_METRICS = ("inception_score", "fid", "sfid", "precision", "recall")  # in its order
METRICS = (*ADM_METRICS, "kid")  # what can be asked for
TITLES = {  # ADM's, and ours
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
    "frechet_distance": "Frechet distance",
    "kid": "KID",
}
PUBLISHED_COUNT = 50_000  # images behind a published figure
MIN_IMAGES = 2048  # for a covariance of as many features
FLOAT_BYTES = 4
RUN_FIELDS = ("packages", "platform", "device", "devices")  # may change features' bits
SIDES = ("samples", "reference", "statistics")


def select_metrics(listed: str | None, kid: bool) -> list[str]:
    """Returns the metrics of a list like "fid,recall"; None stands for ADM's five."""
    names = listed.split(",") if listed else list(ADM_METRICS)
    for name in names:
        if name not in METRICS:
            raise UserError(f"--metrics: no {name!r}; there are {', '.join(METRICS)}")
    return [*names, "kid"] if kid and "kid" not in names else names


def fid_of_images(
    batches: Iterable[UInt8[np.ndarray, "n h w 3"]],
    extractor: FeatureExtractor,
    reference: FeatureStatistics,
) -> float:
    """Returns FID of all images in batches, for a curve while training.

    FID falls with the number of images, so only curves of the same number can be
    compared (FID-k).
    """
    require_same_pipeline(extractor.pipeline, reference.pipeline)
    moments = RunningMoments(reference.widths["pool"])
    for features in extractor(batches):
        _require_same_widths({"pool": features["pool"].shape[1]}, reference.widths)
        moments.add(features["pool"])
    if moments.count < 2:
        raise UserError(f"FID of {moments.count} images; draw at least 2")
    return frechet_distance(moments.gaussian(), reference.pool)


def compute_figures(
    samples: FeatureStatistics | None,
    reference: FeatureStatistics | None,
    metrics: Iterable[str],
    progress: Progress = iter,
) -> dict[str, Any]:
    """Returns the figures that are asked for and that both sides have the data for.

    Distances for precision and recall are computed on the devices of all processes; the
    other figures, and the statistics, only process 0 has.

    Args:
      samples: statistics of the samples.
      reference: statistics of the reference.
      metrics: of METRICS.
      progress: wraps an iterable, to draw a bar.
    """
    figures: dict[str, Any] = {}
    if multihost.is_primary():
        if "inception_score" in metrics and samples.score is not None:
            figures["inception_score"] = samples.score
        if "fid" in metrics:
            name = "fid" if samples.is_inception else "frechet_distance"
            figures[name] = frechet_distance(samples.pool, reference.pool)
        if "sfid" in metrics and samples.spatial and reference.spatial:
            figures["sfid"] = frechet_distance(samples.spatial, reference.spatial)
    sides = [side and side.features for side in (samples, reference)]
    if {"precision", "recall"} & set(metrics):
        ours, theirs = map(multihost.broadcast_array, sides)
        if ours is not None and theirs is not None:
            precision, recall = precision_recall(ours, theirs, progress)
            overlap = {"precision": precision, "recall": recall}
            figures |= {name: x for name, x in overlap.items() if name in metrics}
    ours, theirs = sides
    if "kid" in metrics and ours is not None and theirs is not None:
        figures |= kernel_distance(ours, theirs, progress=progress)
    return figures


def frechet_interval(
    features: Float[np.ndarray, "n d"],
    reference: Gaussian,
    resamples: int,
    labels: Int[np.ndarray, " n"] | None = None,
    progress: Progress = iter,
) -> tuple[float, float]:
    """Returns a 95 % interval of the Fréchet distance of sets drawn like this one.

    The reference is taken as exact.

    Args:
      features: of the samples.
      reference: Gaussian of the reference.
      resamples: how many sets are drawn.
      labels: of the images, where it was decided how many each class has; None where
        that is chance too, as of random labels.
      progress: wraps an iterable, to draw a bar.
    """
    groups = fid.class_rows(labels, len(features))
    distance = lambda x: frechet_distance(Gaussian.of(x), reference)
    rows = progress(fid.bootstrap_rows(groups, resamples))
    resampled = [distance(features[chosen]) for chosen in rows]
    return fid.bootstrap_interval(distance(features), resampled, groups)


def figure_lines(figures: dict[str, Any]) -> list[str]:
    """Returns a line for each figure, ADM's five as ADM prints them."""
    lines = [f"{TITLES[name]}: {figures[name]}" for name in TITLES if name in figures]
    if "interval" in figures:
        low, high = figures["interval"]
        classes = "as they are" if figures.get("interval_by_class") else "drawn too"
        lines.append(
            f"95 % of other samples, classes {classes}: {low:.6g} to {high:.6g}"
        )
    return lines


def figure_notes(
    count: int | None, metrics: Iterable[str], figures: dict[str, Any]
) -> list[str]:
    """Returns sentences on what a reader of the figures has to know."""
    notes = []
    if {"fid", "sfid"} & figures.keys() and count != PUBLISHED_COUNT:
        images = "an unknown number of" if count is None else count
        notes.append(f"{images} images: not comparable with a published FID-50K")
    computed = {*figures, "fid"} if "frechet_distance" in figures else {*figures}
    if left_out := [TITLES[name] for name in metrics if name not in computed]:
        listed = ", ".join(left_out)
        notes.append(f"not computed, for the files lack what it takes: {listed}")
    return notes


def require_enough_images(
    metrics: Iterable[str], path: Path, contents: Contents
) -> None:
    """Refuses covariances of too few images, where their number is known."""
    least, count = MIN_IMAGES, contents.count
    if contents.is_inception is False:
        least = contents.widths["pool"]
    if {"fid", "sfid"} & set(metrics) and count is not None and count < least:
        raise UserError(
            f"{path} has {count} images; FID and sFID need {least} for their "
            "covariances; --force computes them nevertheless, --metrics without them"
        )


def require_comparable(
    samples: EvaluationInput,
    reference: EvaluationInput,
    extractor: FeatureExtractor | None,
    force: bool = False,
) -> None:
    """Refuses sides whose features come from other networks, sizes or pipelines."""
    ours, theirs = (side.contents(extractor) for side in (samples, reference))
    if {True, False} <= {ours.is_inception, theirs.is_inception}:
        raise UserError(
            f"only one of {samples.path} and {reference.path} has features of the "
            "Inception network"
        )
    _require_same_widths(ours.widths, theirs.widths)
    if not force:
        require_same_pipeline(ours.pipeline, theirs.pipeline)


def require_same_pipeline(pipeline: Pipeline | None, other: Pipeline | None) -> None:
    """Refuses a reference whose features come from another pipeline."""
    if names := pipeline_differences(pipeline, other):
        differences = "; ".join(
            f"{name}: {other.get(name)}, not {pipeline.get(name)}" for name in names
        )
        raise UserError(
            "the reference was made by another pipeline (library "
            f"{other.get('library')}; {differences}); make it anew by --stats, or "
            "compare all the same by --force"
        )


def _require_same_widths(ours, theirs):
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            raise UserError(
                f"the reference has {theirs[name]} {name} features, the samples have "
                f"{ours[name]}: they come from other networks"
            )


# ---- how labels were chosen ----


def label_policy(labels: Int[np.ndarray, " n"], num_classes: int) -> str:
    """Guesses how labels were chosen: balanced, listed, random, or none."""
    if len(labels) == 0:
        return "none"
    counts = np.bincount(labels, minlength=num_classes)
    if np.ptp(counts) <= 1 and len(labels) >= num_classes:
        return "balanced"
    runs = 1 + int((np.diff(labels) != 0).sum())
    present = counts[counts > 0]
    return "listed" if runs == len(present) and np.ptp(present) == 0 else "random"


def fixed_labels(path: Path, count: int) -> Int[np.ndarray, " n"] | None:
    """Returns the labels of samples if the number of each class was decided.

    They come from the manifest beside the samples, or from arr_1 of an .npz.
    """
    labels, num_classes = np.zeros(0, int), 0
    if manifest_path(path).is_file():
        manifest = files.read_json(manifest_path(path))
        labels = np.asarray(manifest.get("job", {}).get("labels", [])).reshape(-1)
        num_classes = manifest_classes(manifest)
    elif path.is_file() and "arr_1" in (file := ArrayFile(path)):
        labels = file.array("arr_1").reshape(-1)
    if len(labels) != count or labels.dtype.kind not in "iu" or labels.min() < 0:
        return None
    policy = label_policy(labels, num_classes or labels.max() + 1)
    return None if policy == "random" else labels


def manifest_classes(manifest: dict[str, Any]) -> int:
    """Returns the classes of a manifest's network, or 0 if it does not say."""
    model = manifest.get("job", {}).get("config", {}).get("model", {})
    return int(model.get("classes", 0) or 0)


# ---- an evaluation that may be killed and goes on ----


@dataclasses.dataclass(frozen=True)
class EvaluationOutput:
    """Where an evaluation writes; features lie beside it until it is whole.

    Attributes:
      path: of the figures or statistics.
      features: where the samples' features are kept, or None.
    """

    path: AnyPath
    features: AnyPath | None

    def parts(self, name: str) -> str:
        """Returns the output whose parts are the features of one of SIDES."""
        return f"{self.path}.{name}"


@contextlib.contextmanager
def open_output(
    path: PathLike, overwrite: bool, features: PathLike | None = None
) -> Iterator[EvaluationOutput]:
    """Gives an output that no other run makes meanwhile.

    Args:
      path: of the figures or statistics.
      overwrite: whether what is there may be replaced. What a killed run of the same
        output has written always may.
      features: where the samples' features are kept, or None.
    """
    with multihost.lock_output(path):
        output = EvaluationOutput(files.absolute_path(path), features)
        parts = [output.parts(name) for name in SIDES]
        for target in filter(None, (path, features)):
            is_ours = any(partial_results.is_begun(out, target) for out in parts)
            files.require_free(target, overwrite or is_ours)
        multihost.barrier()  # until all have seen that these places are free
        yield output
        if multihost.is_primary():
            for out in parts:
                partial_results.remove_parts(out)


def compute_statistics(
    side: EvaluationInput,
    extractor: FeatureExtractor | None,
    output: EvaluationOutput,
    name: str,
    keep: int | None = None,
) -> FeatureStatistics | None:
    """Returns a side's statistics, from its file and from what that lacks.

    Args:
      side: samples or reference.
      extractor: makes features of images; None if there is none.
      output: of the evaluation.
      name: one of SIDES.
      keep: how many features the statistics hold; None means all.

    Returns:
      Statistics, in process 0; those made of images are None in the others.
    """
    if side.statistics is not None and (side.images is None or extractor is None):
        return side.statistics
    source, store = side.source(extractor), {}
    batches = source.batches()
    if side.images is not None:
        batches = resume_features(source, output, name)
    if not multihost.is_primary():
        for _ in batches:  # its share of every batch
            pass
        return None
    features_out = output.features if name == "samples" else None
    if features_out:
        batches = keep_features(batches, source.count, store)
    statistics = collect_statistics(
        _show_progress(batches, source.count),
        source.count,
        keep=keep,
        pipeline=source.pipeline,
        is_inception=source.is_inception,
    )
    if features_out:
        record = {"pipeline": source.pipeline, "data": str(side.path)}
        write_features(features_out, store, record)
        print(f"features of {source.count} images", features_out)
    if side.statistics is None:
        return statistics
    features, score = statistics.features, statistics.score
    return dataclasses.replace(side.statistics, features=features, score=score)


def resume_features(
    source: ExtractedFeatures, output: EvaluationOutput, name: str
) -> Iterator[Batch]:
    """Returns batches of features of images, kept on disk as they are made.

    Those on disk already, of a killed run, are not made again. In processes other than
    0 only those come that are made.
    """
    count = -(-source.count // source.extractor.batch_size)
    partial = missing = None
    if multihost.is_primary():
        out = output.parts(name)
        writes = [path for path in (output.path, output.features) if path]
        digest = _features_digest(source)
        partial = partial_results.PartialResults(
            out, digest, overwrite=True, writes=writes
        )
        missing = partial.check(count)
        size = source.count * sum(source.widths.values()) * FLOAT_BYTES
        files.require_space(output.path, max(0, size - partial_results.parts_size(out)))
    missing = multihost.broadcast(missing)
    there = set(range(count)).difference(missing)
    if there:
        print(f"{len(there)} of {count} batches of {name} are there", flush=True)
    computed = source.batches(missing)
    if partial is None:
        return computed

    def read_or_save():
        for batch in range(count):
            if batch in there:
                yield partial.read(batch)
            else:
                features = next(computed)
                partial.save(batch, features)
                yield features

    return read_or_save()


def _features_digest(source):
    """Hashes everything that decides the features and their batches."""
    run = environment()
    fields = {
        "images": [source.count, source.images.identity],
        "pipeline": source.pipeline,
        "batch_size": source.extractor.batch_size,
        **{name: run[name] for name in RUN_FIELDS},
    }
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _show_progress(batches, count):
    from tqdm import tqdm

    with tqdm(total=count, unit="image", disable=None) as bar:
        for batch in batches:
            yield batch
            bar.update(len(batch["pool"]))


# ---- what diagnose.py compares ----


def load_features(
    side: EvaluationInput, make_extractor: Callable[[], FeatureExtractor]
) -> Float[np.ndarray, "n d"]:
    """Returns all features of a side, by the network where they are not stored."""
    if side.images is None and side.stored is None:
        raise UserError(f"{side.path} holds statistics; samples need all features")
    source = side.source(None if side.images is None else make_extractor())
    return np.concatenate([batch["pool"] for batch in source.batches()])


def load_gaussian(
    path: PathLike, make_extractor: Callable[[], FeatureExtractor]
) -> Gaussian:
    """Returns the Gaussian of statistics, or of all features."""
    side = open_input(path)
    if side.statistics is not None:
        return side.statistics.pool
    return Gaussian.of(load_features(side, make_extractor))
