"""Why two figures differ: python diagnose.py A B --out report/

A and B are bundles, or samples with a manifest beside them. A bundle is made on each
machine by diagnose.py --collect OUT --from-manifest M; taking --inputs of the other
side's, both compute the same images.
"""

import dataclasses
from typing import Any

from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.convert.open import WeightsRef
from sit_jax.diagnosis import bundle as bundles
from sit_jax.diagnosis import paired
from sit_jax.diagnosis import report as reports
from sit_jax.diagnosis.stages import collect
from sit_jax.diagnosis.swaps import decode_latents, swap_inputs
from sit_jax.errors import UserError
from sit_jax.evaluation.evaluate import Evaluator
from sit_jax.evaluation.features import WIDTHS, StoredFeatures
from sit_jax.evaluation.image_sets import input_of_images, open_input
from sit_jax.files import as_path, local_path, read_json, require_free
from sit_jax.parallel import multihost
from sit_jax.ranges import COUNT, AtLeast
from sit_jax.recipes import published
from sit_jax.sampling import job
from sit_jax.sampling.outputs import ArrayFile
from sit_jax.sampling.run import SamplingContext, build_context
from sit_jax.trainer.compile import use_compilation_cache

USAGE = "name A and B and --out FOLDER, or --collect OUT"
OF_FIGURES = (
    *("reference_b", "seeds", "swap", "swapped", "features_b", "inception_b"),
    "resamples",
)


@entry_point
def main() -> int:
    args, _ = parse_args(_parser())
    multihost.initialize(args)
    use_compilation_cache()
    target = args.collect or args.out
    if not target:
        raise UserError(USAGE)
    with multihost.lock_output(target):
        return make_bundle(args) if args.collect else make_report(args)


def make_bundle(args: Any) -> int:
    """Writes the bundle of --from-manifest to --collect, and returns the exit code."""
    if args.sides or not args.from_manifest:
        raise UserError("--collect OUT needs --from-manifest M, and no A and B")
    out = require_free(local_path(args.collect), args.overwrite)
    inputs_of = bundles.read(args.inputs) if args.inputs else None
    if args.features:
        StoredFeatures(ArrayFile(args.features))  # or it is refused
    context, manifest = open_context(args)
    bundle = collect(
        context,
        manifest,
        out,
        images=args.images,
        steps=args.steps,
        inputs_of=inputs_of,
        extractor=_extractor(args),
    )
    multihost.barrier()  # until all have seen that this place is free
    if multihost.is_primary():
        bundles.write(bundle, args.features)
    size = sum(stage.nbytes for stage in bundle.stages.values()) / 1e6
    count = len(bundle.inputs["t"])
    print(f"{len(bundle.stages)} stages of {count} images, {size:.3g} MB")
    print(out)
    return 0


def open_context(args: Any) -> tuple[SamplingContext, dict[str, Any]]:
    """Loads what --from-manifest was drawn with, and its manifest."""
    path = as_path(args.from_manifest)
    path = path / "manifest.json" if path.is_dir() else path
    wanted, sha256 = job.read_manifest(args.from_manifest)
    if args.weights:
        wanted = dataclasses.replace(wanted, weights=args.weights)
    context = build_context(
        wanted,
        _open_weights(wanted.weights, wanted.family, wanted.heads),
        _open_weights(wanted.weak) if wanted.weak else None,
        None if args.force else sha256,
    )
    return context, read_json(path)


def make_report(args: Any) -> int:
    """Writes the report on two sides to --out, and returns the exit code."""
    if len(args.sides) != 2:
        raise UserError(USAGE)
    out = require_free(args.out, args.overwrite)
    evaluator = Evaluator(args.network, args.inception, args.batch_size)
    a, b = (
        _with_decoded_latents(args, reports.open_evidence(side, evaluator.width))
        for side in args.sides
    )
    are_pairs = args.paired or reports.are_pairs(a, b)
    images = [_images_of(side) for side in (a, b)]
    has_worst_pairs = are_pairs and None not in images
    has_evidence = None not in (a.bundle, b.bundle) or None not in (
        a.manifest,
        b.manifest,
    )
    if not (has_evidence or args.reference or has_worst_pairs):
        raise UserError("A and B have no bundles or manifests: give --reference")
    has_samples = a.samples or b.samples or None in (a.bundle, b.bundle)
    flags = [name for name in OF_FIGURES if getattr(args, name)]
    if flags and not (has_samples and args.reference):
        raise UserError(
            f"--{flags[0].replace('_', '-')} is for figures of pictures or features: "
            "give --reference, and sides that have them"
        )
    reference = evaluator.gaussian(args.reference) if args.reference else None
    gap, swaps = None, []
    if has_samples and reference is not None:
        gap, swaps = _compare_samples(args, evaluator, (a, b), are_pairs, reference)
    worst, tiles = paired.worst_pairs(*images) if has_worst_pairs else ((), None)
    report = reports.diagnose(
        a, b, gap=gap, swaps=swaps, worst=worst, reference=reference
    )
    multihost.barrier()
    if multihost.is_primary():
        reports.save(out, report, tiles)
    print(report["verdict"], *filter(None, [report["first"]]), out, sep="\n")
    return 0


def _parser():
    parser = make_parser(__doc__.splitlines()[0], has_config=False)
    add = parser.add_argument
    add("sides", nargs="*", metavar="A B", help="bundles, or samples with manifests")
    add("--out", metavar="FOLDER", help="of the report")
    add("--reference", metavar="REF", help="for FIDs: images, features, statistics")
    add("--reference-b", metavar="REF", help="B's, if it was another")
    add("--seeds", action="append", default=[], metavar="X", help="one more seed's set")
    add("--swap", action="append", default=[], metavar="NAME=FEATURES.npz")
    add("--swapped", metavar="X.npy", help="latents of A's network from B's noise")
    add("--features-b", metavar="X.npz", help="B's pictures by B's own evaluator")
    add("--paired", action="store_true", help="image i of both has one noise and label")
    resamples = {"type": AtLeast(10), "default": 0, "metavar": "N"}
    add("--resamples", **resamples, help="of pairs: their interval by bootstrap")
    add("--inception", metavar="FILE", help="weights of the 2015 network, for images")
    add("--inception-b", metavar="FILE", help="B's, if it was another")
    add("--network", choices=list(WIDTHS), default="inception", help="of the features")
    add("--batch-size", type=COUNT, default=64, metavar="N")
    add("--overwrite", action="store_true")
    add = parser.add_argument_group("to make a bundle").add_argument
    add("--collect", metavar="OUT", help="the bundle, a folder")
    add("--from-manifest", metavar="M", help="of samples that were drawn")
    add("--weights", metavar="PATH", help="where they are on this machine")
    add("--inputs", metavar="BUNDLE", help="take its noise, times and labels")
    add("--images", type=COUNT, default=8, metavar="N")
    add("--steps", type=COUNT, default=50, metavar="N", help="of the fixed grid")
    add("--features", metavar="X.npz", help="of the samples, to go with them")
    add("--force", action="store_true", help="other weights than the manifest's")
    multihost.add_flags(parser)
    return parser


def _compare_samples(args, evaluator, sides, are_pairs, reference):
    """Returns the gap of the FIDs, and the steps from A's to B's."""
    for side in sides:
        if side.samples is None:
            raise UserError(f"{side.path} has no images or features for --reference")
    inputs = _swap_chain(args, evaluator, [side.samples for side in sides], are_pairs)
    # what is in the chain twice is evaluated once
    distinct = {id(side): side for _, side in inputs}
    features = {key: evaluator.features(side) for key, side in distinct.items()}
    chain = [(name, features[id(side)]) for name, side in inputs]
    theirs = chain[-1][1]
    gap = paired.compare(
        chain[0][1],
        theirs,
        reference,
        are_pairs,
        seeds=[
            paired.fid_of_features(evaluator.features(evaluator.open(path)), reference)
            for path in args.seeds
        ],
        labels=reports.labels_of(*sides),
        resamples=args.resamples,
    )
    last = None
    if args.inception_b is not None:
        last = _evaluate_by_other_network(args, inputs[-1][1])
    elif args.reference_b:
        last = "reference", theirs, evaluator.gaussian(args.reference_b)
    return gap, paired.swap_steps(chain, reference, last)


def _evaluate_by_other_network(args, side):
    """Returns what B's network makes of B's pictures and of the reference."""
    if args.network != "inception":
        raise UserError(f"--inception-b has no use beside --network {args.network}")
    evaluator = Evaluator(args.network, args.inception_b, args.batch_size)
    inputs = [side] if args.reference_b else [side, evaluator.open(args.reference)]
    for one in inputs:
        if one.statistics is not None or not one.source.needs_network:
            raise UserError(
                f"--inception-b {args.inception_b} judges pictures, and {one.path} "
                "has other things; give --reference-b or --features-b, made by it"
            )
    reference = evaluator.gaussian(args.reference_b or args.reference)
    return "feature network", evaluator.features(side), reference


def _swap_chain(args, evaluator, samples, are_pairs):
    """Returns what was exchanged, and the input, from A to B."""
    a, b = samples
    chain = swap_inputs(
        a, b, same_start=are_pairs, width=evaluator.width, swapped=args.swapped
    )
    for text in args.swap:
        name, separator, path = text.partition("=")
        if not separator:
            raise UserError(f"--swap {text}: NAME=FEATURES.npz")
        chain.append((name, evaluator.open(path)))
    if args.features_b:
        return [*chain, ("features", open_input(args.features_b, only_features=True))]
    return chain if chain[-1][1] is b else [*chain, ("the rest: B", b)]


def _with_decoded_latents(args, evidence):
    """Returns evidence whose latents are pictures, if it has any, and a VAE."""
    has_latents = evidence.path.suffix == ".npy" and evidence.manifest is not None
    if not (has_latents and args.reference):
        return evidence
    images = decode_latents(evidence.path, evidence.manifest)
    samples = images and input_of_images(images, WIDTHS[args.network])
    return dataclasses.replace(evidence, samples=samples)


def _extractor(args):
    """Returns the extractor of a bundle, or None without Inception's weights."""
    try:
        return Evaluator(args.network, args.inception, args.batch_size).extractor()
    except UserError as error:
        if args.inception:
            raise
        print(f"no features among the stages: {error}")
        return None


def _images_of(evidence):
    source = evidence.samples and evidence.samples.source
    return source.images if source and source.needs_network else None


def _open_weights(path, family=None, heads=None):
    return WeightsRef(path, family=family, heads=heads, base=published).open()


if __name__ == "__main__":
    main()
