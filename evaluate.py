"""Judges images: python evaluate.py samples.npz --reference VIRTUAL_imagenet256.npz

Inception Score, FID, sFID, precision and recall, as ADM's evaluator prints them, and a
JSON file beside the samples. python evaluate.py --stats DATA --out ref.npz makes a
reference; --features takes features that were stored, and needs no network. Killed,
the same command goes on. The likelihood of a data set is sample.py --likelihood's.
"""

from functools import partial
from pathlib import Path

from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.convert import inception
from sit_jax.errors import UserError
from sit_jax.evaluation import evaluation, label_policy, summary
from sit_jax.evaluation.digit_features import WIDTHS, DigitFeatures
from sit_jax.evaluation.evaluated import open_side
from sit_jax.evaluation.features import inception_extractor
from sit_jax.evaluation.unfinished import unfinished
from sit_jax.files import read_json, write_json
from sit_jax.manifest import environment
from sit_jax.parallel import multihost
from sit_jax.parallel.mesh import make_mesh
from sit_jax.ranges import COUNT, AtLeast
from sit_jax.sampling import outputs
from sit_jax.trainer.compile import use_compilation_cache

KEPT = 10_000  # features in a statistics file: as many as ADM's references have images
LONG = 16  # a list in a manifest that is left out of the record


@entry_point
def main():
    args, rest = parse_args(_parser())
    if rest:
        raise UserError(f"{rest[0]}: this script has no config")
    multihost.initialize(args)
    use_compilation_cache()
    return make_reference(args) if args.stats else evaluate(args)


def evaluate(args):
    """Samples against a reference -> exit code, after lines and JSON are written."""
    if (args.samples is None) == (args.features is None):
        raise UserError("name SAMPLES or --features X.npz, one of the two")
    if args.reference is None:
        raise UserError("--reference REF names what the samples are compared with")
    wanted = evaluation.wanted(args.metrics, args.kid)
    only = args.features is not None
    width = WIDTHS[args.network]
    samples = open_side(args.features if only else args.samples, only, width)
    reference = open_side(args.reference, width=width)
    out = args.out or _beside(samples.path)
    with unfinished(out, args.overwrite, args.save_features) as work:
        return _judged(args, work, samples, reference, wanted)


def _judged(args, work, samples, reference, wanted):
    """Sides, judged into an Unfinished -> exit code."""
    needs = evaluation.needs_features(wanted) or args.bootstrap is not None
    missing = (
        samples.missing(needs, "inception_score" in wanted),
        reference.missing(needs, False),
    )
    if not args.force:
        evaluation.require_enough(wanted, samples, reference)
    extractor = _extractor(args, (samples, reference), missing)
    evaluation.require_comparable(samples, reference, extractor, args.force)
    print("samples", samples.describe())
    print("reference", reference.describe(), flush=True)
    ours = work.complete(samples, missing[0], extractor, "samples")
    theirs = work.complete(reference, missing[1], extractor, "reference")
    shares = _overlap(ours, theirs, wanted)
    if multihost.is_primary():
        found = _figures(args, samples, ours, theirs, wanted, shares)
        notes = evaluation.notes(ours.count, wanted, found)
        print(*evaluation.lines(found), *notes, sep="\n")
        sides = {"samples": (samples, ours), "reference": (reference, theirs)}
        write_json(work.out, _record(sides, extractor, found, notes))
        work.finish()
        print(work.out)
    return 0


def _parser():
    parser = make_parser(__doc__.splitlines()[0])
    parser.epilog = None  # there is no config
    add = parser.add_argument
    add("samples", nargs="?", metavar="SAMPLES", help=".npz with arr_0, or a folder")
    add("--features", metavar="X.npz", help="stored features instead of SAMPLES")
    add("--reference", metavar="REF", help="images, ADM's .npz, or made by --stats")
    add("--stats", metavar="DATA", help="make a reference of these images or features")
    add("--out", metavar="FILE", help="default: a JSON beside SAMPLES")
    add("--save-features", metavar="X.npz", help="keep them for --features")
    add("--metrics", metavar="A,B", help=f"of {','.join(evaluation.WANTED)}")
    add("--kid", action="store_true", help="the kernel distance too")
    add(
        "--bootstrap",
        type=AtLeast(10),
        metavar="N",
        help="resamples for an interval of FID",
    )
    add("--batch-size", type=COUNT, default=64, metavar="N")
    add("--inception", metavar="FILE", help="weights of the 2015 network")
    add("--network", choices=list(WIDTHS), default="inception", help="of the features")
    add("--force", action="store_true", help="compare what is not comparable")
    add("--overwrite", action="store_true")
    multihost.add_flags(parser)
    return parser


def _overlap(ours, theirs, wanted):
    """Summaries, which process 0 has -> precision and recall, in all processes."""
    if not set(evaluation.SHARES) & set(wanted):
        return {}
    if multihost.is_primary():
        evaluation.require_widths(ours.widths(), theirs.widths())
    sides = [
        multihost.broadcast_array(each and each.features) for each in (ours, theirs)
    ]
    return evaluation.overlap(*sides, wanted, _bar("blocks"))


def _figures(args, side, ours, theirs, wanted, shares):
    """Summaries -> {name: figure}, with an interval if it is asked for."""
    found = evaluation.figures(ours, theirs, wanted, shares, _bar("blocks"))
    if args.bootstrap and ours.features is not None:
        bar = partial(_bar("resamples"), total=args.bootstrap)
        labels = label_policy.decided(side.path, ours.count)
        how = (ours.features, theirs.pool, args.bootstrap, labels, bar)
        found["interval"] = evaluation.interval(*how)
        found["interval_by_class"] = labels is not None
        found["resamples"] = args.bootstrap
    return found


def make_reference(args):
    """A statistics file of --stats at --out -> exit code."""
    if not args.out or Path(args.out).suffix != ".npz":
        raise UserError("--stats needs --out FILE.npz to write to")
    for name in ("samples", "features", "reference", "bootstrap", "save_features"):
        if getattr(args, name) is not None:
            raise UserError(f"--stats makes a reference, and takes no {name}")
    side = open_side(args.stats, width=WIDTHS[args.network])
    with unfinished(args.out, args.overwrite) as work:
        if side.summary is not None:
            raise UserError(f"{side.path} holds statistics already: it is a reference")
        if not args.force:
            evaluation.require_enough(["fid"], side)
        extractor = _extractor(args, [side], [side.source])
        found = work.summarized(side.source, extractor, "statistics", KEPT)
        if multihost.is_primary():
            record = {"data": str(side.path), "environment": environment()}
            summary.save(work.out, found, record)
            work.finish()
            kept = f"{len(found.features)} features of them"
            print(f"statistics of {found.count} images, {kept}", work.out)
    return 0


def _beside(path):
    """Where the figures of samples go: beside a file, inside a folder."""
    if path.is_dir():
        return path / "evaluation.json"
    return path.with_name(f"{path.name}.evaluation.json")


def _extractor(args, sides, missing):
    """What makes features of images, the same on all hosts, or None."""
    found = _network(args, sides, missing)
    # what only some hosts compute would hang the others
    weights = found and (found.pipeline or {}).get("weights", args.network)
    multihost.assert_equal(
        "Inception weights found", weights, "give the same to all hosts"
    )
    return found


def _network(args, sides, missing):
    """The 2015 network, if images have to go through it.

    Without its weights, images that stand beside statistics are left out.
    """
    needs = [
        (side, source)
        for side, source in zip(sides, missing, strict=True)
        if source is not None and source.needs_network
    ]
    if not needs:
        return None
    if args.network == "digits":
        return DigitFeatures()
    most = max(source.count for _, source in needs)
    try:
        weights = inception.load_inception(args.inception)
    except UserError:
        if args.inception or any(side.summary is None for side, _ in needs):
            raise
        return None
    mesh = make_mesh(data=-1, fsdp=1)
    return inception_extractor(weights, mesh, min(args.batch_size, most))


def _bar(unit):
    from tqdm import tqdm

    return partial(tqdm, unit=unit, disable=None, leave=False)


def _record(sides, extractor, found, notes):
    """What the JSON beside the samples says."""
    record = {"figures": found, "notes": notes}
    for name, (side, full) in sides.items():
        record[name] = {
            "path": str(side.path),
            "used": side.keys,
            "images": full.count,
            "features": None if full.features is None else len(full.features),
            "pipeline": side.pipeline(extractor),
        }
    manifest = outputs.manifest_path(sides["samples"][0].path)
    if manifest.is_file():
        record["samples"]["manifest"] = _short(read_json(manifest))
    return record | {"environment": environment()}


def _short(value):
    """A manifest without its long lists, as the labels of all images."""
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    if isinstance(value, list) and len(value) > LONG:
        return f"{len(value)} values"
    return value


if __name__ == "__main__":
    main()
