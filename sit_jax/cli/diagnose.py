"""Why two figures differ: python diagnose.py A B --out report/

A and B are bundles, or samples with a manifest beside them. A bundle is made on each
machine by diagnose.py --collect OUT --from-manifest M; taking --inputs of the other
side's, both compute the same images.
"""

import dataclasses
from functools import partial
from typing import Any

from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.convert.open import WeightsRef
from sit_jax.diagnosis import bundle as bundles
from sit_jax.diagnosis import paired
from sit_jax.diagnosis import report as reports
from sit_jax.diagnosis.stages import collect, make_inputs
from sit_jax.diagnosis.swaps import DecodedLatents, swap_components
from sit_jax.errors import UserError
from sit_jax.evaluation.evaluate import load_features, load_gaussian
from sit_jax.evaluation.features import NETWORKS, StoredFeatures, get_extractor
from sit_jax.evaluation.image_sets import input_of_images, open_input
from sit_jax.files import as_path, local_path, read_json, require_free
from sit_jax.parallel import multihost
from sit_jax.ranges import COUNT, AtLeast
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
    inputs = make_inputs(context, args.images, inputs_of)
    extractor = _try_extractor(args)
    bundle = collect(
        context, manifest, out, inputs, steps=args.steps, extractor=extractor
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
    decode = args.reference is not None
    a, b = (reports.open_evidence(side, decode) for side in args.sides)
    is_paired = args.paired or reports.are_pairs(a, b)
    images = [side.samples and side.samples.images for side in (a, b)]
    has_worst_pairs = is_paired and None not in images
    has_evidence = (a.bundle and b.bundle) or (a.manifest and b.manifest)
    if not (has_evidence or args.reference or has_worst_pairs):
        raise UserError("A and B have no bundles or manifests: give --reference")
    has_samples = a.samples or b.samples or not (a.bundle and b.bundle)
    flags = [name for name in OF_FIGURES if getattr(args, name)]
    if flags and not (has_samples and args.reference):
        raise UserError(
            f"--{flags[0].replace('_', '-')} is for figures of pictures or features: "
            "give --reference, and sides that have them"
        )
    gap, swaps, reference = None, [], None
    if args.reference:
        reference = load_gaussian(args.reference, _make_extractor(args))
        if has_samples:
            gap, swaps = _compare_samples(args, (a, b), is_paired, reference)
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
    add("--network", choices=NETWORKS, default="inception", help="of the features")
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


def _compare_samples(args, sides, is_paired, reference):
    """Returns the gap of the FIDs, and the steps from A's to B's."""
    for side in sides:
        if side.samples is None:
            raise UserError(f"{side.path} has no images or features for --reference")
    inputs = _swap_chain(args, *(side.samples for side in sides), is_paired)
    make_extractor, loaded = _make_extractor(args), {}
    for _, side in inputs:  # what is in the chain twice is evaluated once
        key = id(side.images or side.stored)
        if key not in loaded:
            loaded[key] = load_features(side, make_extractor)
    chain = [(name, loaded[id(side.images or side.stored)]) for name, side in inputs]
    theirs = chain[-1][1]
    fid_of = lambda side: paired.fid_of_features(
        load_features(side, make_extractor), reference
    )
    gap = paired.compare(
        chain[0][1],
        theirs,
        reference,
        is_paired,
        seeds=[fid_of(open_input(path)) for path in args.seeds],
        labels=reports.labels_of(*sides),
        resamples=args.resamples,
    )
    last = None
    if args.inception_b is not None:
        last = _evaluate_by_other_network(args, inputs[-1][1])
    elif args.reference_b:
        last = "reference", theirs, load_gaussian(args.reference_b, make_extractor)
    return gap, paired.swap_steps(chain, reference, last)


def _evaluate_by_other_network(args, side):
    """Returns what B's network makes of B's pictures and of the reference."""
    if args.network != "inception":
        raise UserError(f"--inception-b has no use beside --network {args.network}")
    inputs = [side] if args.reference_b else [side, open_input(args.reference)]
    for each in inputs:
        if each.statistics is not None or each.images is None:
            raise UserError(
                f"--inception-b {args.inception_b} judges pictures, and {each.path} "
                "has other things; give --reference-b or --features-b, made by it"
            )
    make_extractor = _make_extractor(args, args.inception_b)
    reference = load_gaussian(args.reference_b or args.reference, make_extractor)
    return "feature network", load_features(side, make_extractor), reference


def _swap_chain(args, a, b, is_paired):
    """Returns what was exchanged, and the input, from A to B."""
    chain = [("A", a)]
    has_latents = all(isinstance(side.images, DecodedLatents) for side in (a, b))
    if has_latents:
        swaps = swap_components(a.images, b.images, args.swapped, is_paired)
        chain = [(name, input_of_images(images)) for name, images in swaps]
    elif args.swapped:
        raise UserError(f"--swapped {args.swapped} goes with latents (.npy) as A and B")
    for text in args.swap:
        name, separator, path = text.partition("=")
        if not separator:
            raise UserError(f"--swap {text}: NAME=FEATURES.npz")
        chain.append((name, open_input(path)))
    if args.features_b:
        chain.append(("features", open_input(args.features_b, only_features=True)))
    elif args.swap or not has_latents:
        chain.append(("the rest: B", b))
    return chain


def _make_extractor(args, weights=None):
    """Returns a function that makes the extractor, which is done once."""
    weights = weights or args.inception
    return partial(get_extractor, args.network, weights, args.batch_size)


def _try_extractor(args):
    """Returns the extractor of a bundle, or None without Inception's weights."""
    try:
        return _make_extractor(args)()
    except UserError as error:
        if args.inception:
            raise
        print(f"no features among the stages: {error}")
        return None


def _open_weights(path, family=None, heads=None):
    return WeightsRef(path, family=family, heads=heads).open()


if __name__ == "__main__":
    main()
