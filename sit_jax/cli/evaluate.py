"""Judges images: python evaluate.py samples.npz --reference VIRTUAL_imagenet256.npz

Inception Score, FID, sFID, precision and recall, as ADM's evaluator prints them, and a
JSON file beside the samples. python evaluate.py --stats DATA --out ref.npz makes a
reference; --features takes features that were stored, and needs no network. python
evaluate.py digits.npz --network digits judges the demo's digits. Killed, the same
command goes on. The likelihood of a data set is sample.py --likelihood's.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.errors import UserError
from sit_jax.evaluation import evaluate as evaluation
from sit_jax.evaluation.digits import digit_figures
from sit_jax.evaluation.evaluate import compute_statistics, open_output
from sit_jax.evaluation.features import NETWORKS, get_extractor
from sit_jax.evaluation.image_sets import open_input
from sit_jax.evaluation.statistics import save_statistics
from sit_jax.files import as_path, read_json, require_free, write_json
from sit_jax.manifest import environment
from sit_jax.parallel import multihost
from sit_jax.ranges import COUNT, AtLeast
from sit_jax.sampling.outputs import ArrayFile, manifest_path
from sit_jax.trainer.compile import use_compilation_cache

KEPT_FEATURES = 10_000  # in a statistics file: as many as ADM's references have images
LONG = 16  # a list in a manifest that is left out of the record


@entry_point
def main() -> int:
    args, _ = parse_args(_parser())
    multihost.initialize(args)
    use_compilation_cache()
    if args.stats:
        return make_reference(args)
    if args.network == "digits" and args.reference is None and args.samples:
        return evaluate_digits(args)
    return evaluate(args)


def evaluate(args: Any) -> int:
    """Prints the figures of samples against a reference, and writes them as JSON."""
    if (args.samples is None) == (args.features is None):
        raise UserError("name SAMPLES or --features X.npz, one of the two")
    if args.reference is None:
        raise UserError("--reference REF names what the samples are compared with")
    metrics = evaluation.select_metrics(args.metrics, args.kid)
    needs_features = args.bootstrap or {"precision", "recall", "kid"} & set(metrics)
    samples = open_input(args.samples or args.features, bool(args.features))
    samples = samples.without_images(needs_features, "inception_score" in metrics)
    reference = open_input(args.reference).without_images(needs_features, score=False)
    out = args.out or _default_out(samples.path)
    with open_output(out, args.overwrite, args.save_features) as output:
        extractor = _extractor(args, samples, reference)
        evaluation.require_comparable(samples, reference, extractor, args.force)
        if not args.force:
            for side in (samples, reference):
                contents = side.contents(extractor)
                evaluation.require_enough_images(metrics, side.path, contents)
        print("samples", samples.describe())
        print("reference", reference.describe(), flush=True)
        ours = compute_statistics(samples, extractor, output, "samples")
        theirs = compute_statistics(reference, extractor, output, "reference")
        figures = evaluation.compute_figures(ours, theirs, metrics, _bar)
        if multihost.is_primary():
            if args.bootstrap and ours.features is not None:
                figures |= _interval(args, samples.path, ours, theirs)
            notes = evaluation.figure_notes(ours.count, metrics, figures)
            print(*evaluation.figure_lines(figures), *notes, sep="\n")
            record = {
                "figures": figures,
                "notes": notes,
                "samples": _side_record(samples, ours, extractor),
                "reference": _side_record(reference, theirs, extractor),
                "environment": environment(),
            }
            if manifest_path(samples.path).is_file():
                manifest = read_json(manifest_path(samples.path))
                record["samples"]["manifest"] = _shorten(manifest)
            write_json(output.path, record)
            print(output.path)
    return 0


def _interval(args, path, ours, theirs):
    """Returns the interval of FID, and how it was drawn."""
    labels = evaluation.fixed_labels(path, ours.count)
    bar = partial(_bar, total=args.bootstrap)
    interval = evaluation.frechet_interval(
        ours.features, theirs.pool, args.bootstrap, labels, bar
    )
    return {
        "interval": interval,
        "interval_by_class": labels is not None,
        "resamples": args.bootstrap,
    }


def _side_record(side, statistics, extractor):
    """Returns what the JSON says of samples or a reference."""
    features = statistics.features
    return {
        "path": str(side.path),
        "used": side.keys,
        "images": statistics.count,
        "features": None if features is None else len(features),
        "pipeline": side.contents(extractor).pipeline,
    }


def make_reference(args: Any) -> int:
    """Writes the statistics of --stats to --out."""
    if not args.out or Path(args.out).suffix != ".npz":
        raise UserError("--stats needs --out FILE.npz to write to")
    others = (args.samples, args.features, args.reference, args.bootstrap)
    if any(others) or args.save_features:
        raise UserError("--stats takes no samples, features, reference or bootstrap")
    side = open_input(args.stats)
    if side.statistics is not None:
        raise UserError(f"{side.path} holds statistics already: it is a reference")
    with open_output(args.out, args.overwrite) as output:
        extractor = _extractor(args, side)
        if not args.force:
            contents = side.contents(extractor)
            evaluation.require_enough_images(["fid"], side.path, contents)
        statistics = compute_statistics(
            side, extractor, output, "statistics", keep=KEPT_FEATURES
        )
        if multihost.is_primary():
            record = {"data": str(side.path), "environment": environment()}
            save_statistics(output.path, statistics, record)
            kept = f"{len(statistics.features)} features of them"
            print(f"statistics of {statistics.count} images, {kept}", output.path)
    return 0


def evaluate_digits(args: Any) -> int:
    """Prints how many digits are recognised, and their distance to held-out digits."""
    path = as_path(args.samples)
    out = require_free(args.out or _default_out(path), args.overwrite)
    file = ArrayFile(path)
    images, labels = file.array("arr_0"), file.array("arr_1")
    if images.shape[1:] != (8, 8, 1) or images.dtype != np.uint8 or len(images) < 2:
        raise UserError(
            f"{path} holds {images.dtype} {images.shape}; it must be uint8 (N, 8, 8, "
            "1), at least 2 digits"
        )
    figures = digit_figures(images, labels)
    print(
        f"recognised as the digit asked for: {figures['samples_recognised']:.3f} of "
        f"{figures['samples']} samples, {figures['real_recognised']:.3f} of "
        f"{figures['held_out']} held-out real digits",
        f"Frechet distance to held-out digits: {figures['frechet_samples']:.2f} for "
        f"{figures['samples']} samples, {figures['frechet_real']:.2f} for "
        f"{figures['real']} real training digits",
        out,
        sep="\n",
    )
    if multihost.is_primary():
        write_json(out, {"figures": figures, "environment": environment()})
    return 0


def _parser():
    parser = make_parser(__doc__.splitlines()[0], has_config=False)
    parser.epilog = None  # there is no config
    add = parser.add_argument
    add("samples", nargs="?", metavar="SAMPLES", help=".npz with arr_0, or a folder")
    add("--features", metavar="X.npz", help="stored features instead of SAMPLES")
    add("--reference", metavar="REF", help="images, ADM's .npz, or made by --stats")
    add("--stats", metavar="DATA", help="make a reference of these images or features")
    add("--out", metavar="FILE", help="default: a JSON beside SAMPLES")
    add("--save-features", metavar="X.npz", help="keep them for --features")
    add("--metrics", metavar="A,B", help=f"of {','.join(evaluation.METRICS)}")
    add("--kid", action="store_true", help="the kernel distance too")
    resamples = {"type": AtLeast(10), "metavar": "N"}
    add("--bootstrap", **resamples, help="resamples for an interval of FID")
    add("--batch-size", type=COUNT, default=64, metavar="N")
    add("--inception", metavar="FILE", help="weights of the 2015 network")
    add("--network", choices=NETWORKS, default="inception", help="of the features")
    add("--force", action="store_true", help="compare what is not comparable")
    add("--overwrite", action="store_true")
    multihost.add_flags(parser)
    return parser


def _default_out(path):
    """Returns where the figures of samples go: beside a file, inside a folder."""
    if path.is_dir():
        return path / "evaluation.json"
    return path.with_name(f"{path.name}.evaluation.json")


def _extractor(args, *sides):
    """Returns what makes features of images, the same on all hosts, or None.

    Without Inception's weights, images that stand beside statistics are left out.
    """
    sides = [side for side in sides if side.images is not None]
    extractor = None
    if sides:
        batch_size = min(args.batch_size, max(len(side.images) for side in sides))
        try:
            extractor = get_extractor(args.network, args.inception, batch_size)
        except UserError:
            if args.inception or any(side.statistics is None for side in sides):
                raise
    # what only some hosts compute would hang the others
    weights = extractor and extractor.pipeline.get("weights", args.network)
    multihost.assert_equal("Inception weights", weights, "give the same to all hosts")
    return extractor


def _bar(iterable, **options):
    from tqdm import tqdm

    return tqdm(iterable, disable=None, leave=False, **options)


def _shorten(value):
    """Returns a manifest without its long lists, such as the labels of all images."""
    if isinstance(value, dict):
        return {name: _shorten(item) for name, item in value.items()}
    if isinstance(value, list) and len(value) > LONG:
        return f"{len(value)} values"
    return value


if __name__ == "__main__":
    main()
