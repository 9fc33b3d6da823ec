"""Why two figures differ: python diagnose.py A B --out report/

A and B are bundles, or samples with a manifest beside them. A bundle is made on each
machine by diagnose.py --collect OUT --from-manifest M; taking --inputs of the other
side's, both compute the same images.
"""

import dataclasses

from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.convert.open import WeightsRef
from sit_jax.diagnosis import bundle, paired
from sit_jax.diagnosis import report as diagnosis
from sit_jax.diagnosis.paired import worst_pairs
from sit_jax.diagnosis.stages import collect
from sit_jax.diagnosis.swaps import decoded, exchanged_sides
from sit_jax.errors import UserError
from sit_jax.evaluation.evaluate import Evaluator
from sit_jax.evaluation.features import WIDTHS, StoredFeatures
from sit_jax.evaluation.image_sets import FileFeatures, input_of_images, open_input
from sit_jax.files import as_path, local_path, read_json, require_free
from sit_jax.parallel import multihost
from sit_jax.ranges import COUNT, AtLeast
from sit_jax.recipes import published
from sit_jax.sampling import job
from sit_jax.sampling.outputs import ArrayFile
from sit_jax.sampling.run import build_context
from sit_jax.trainer.compile import use_compilation_cache

OF_FIGURES = (
    *("reference_b", "seeds", "swap", "swapped", "features_b", "inception_b"),
    "resamples",
)


@entry_point
def main():
    args, rest = parse_args(_parser())
    if rest:
        raise UserError(f"{rest[0]}: this script has no config")
    multihost.initialize(args)
    use_compilation_cache()
    target = args.collect or args.out
    if not target:
        raise UserError("name A and B and --out FOLDER, or --collect OUT")
    with multihost.lock_output(target):
        return make_bundle(args) if args.collect else report(args)


def make_bundle(args):
    """A bundle of --from-manifest at --collect -> exit code."""
    if args.sides or not args.from_manifest:
        raise UserError("--collect OUT needs --from-manifest M, and no A and B")
    out = require_free(local_path(args.collect), args.overwrite)
    given = bundle.read(args.inputs) if args.inputs else None
    if args.features:
        StoredFeatures(ArrayFile(args.features))  # or it is refused
    room, manifest = studio(args)
    eye = _judge(args)
    made = collect(room, manifest, out, args.images, args.steps, given, eye)
    multihost.barrier()  # until all have seen that this place is free
    if multihost.is_primary():
        bundle.write(made, args.features)
    size = sum(stage.nbytes for stage in made.stages.values()) / 1e6
    print(f"{len(made.stages)} stages of {len(made.inputs['t'])} images, {size:.3g} MB")
    print(out)
    return 0


def studio(args):
    """-> the SamplingContext of --from-manifest, and the manifest."""
    wanted, expected = job.read_manifest(args.from_manifest)
    if args.weights:
        wanted = dataclasses.replace(wanted, weights=args.weights)
    room = build_context(
        wanted,
        _open(wanted.weights, wanted.family, wanted.heads),
        _open(wanted.weak) if wanted.weak else None,
        None if args.force else expected,
    )
    return room, read_json(job_file(args.from_manifest))


def report(args):
    """The report on two sides at --out -> exit code."""
    if len(args.sides) != 2:
        raise UserError("name A and B and --out FOLDER, or --collect OUT")
    out = require_free(args.out, args.overwrite)
    eye = Evaluator(args.network, args.inception, args.batch_size)
    a, b = (
        _seen(args, diagnosis.open_evidence(side, eye.width)) for side in args.sides
    )
    pairs = args.paired or diagnosis.are_pairs(a, b)
    sets = [_images(each) for each in (a, b)]
    pictured = pairs and None not in sets
    if None in (a.bundle, b.bundle) and None in (a.manifest, b.manifest):
        if not (args.reference or pictured):
            raise UserError("A and B have no bundles or manifests: give --reference")
    judged = a.samples or b.samples or None in (a.bundle, b.bundle)
    odd = [name for name in OF_FIGURES if getattr(args, name)]
    if odd and not (judged and args.reference):
        raise UserError(
            f"--{odd[0].replace('_', '-')} is for figures of pictures or features: "
            "give --reference, and sides that have them"
        )
    reference = eye.gaussian(args.reference) if args.reference else None
    gap, swaps = None, ()
    if judged and reference is not None:
        gap, swaps = _statistics(args, eye, a, b, pairs, reference)
    worst, tiles = worst_pairs(*sets) if pictured else ((), None)
    found = diagnosis.diagnose(a, b, gap, swaps, worst, reference)
    multihost.barrier()
    if multihost.is_primary():
        diagnosis.save(out, found, tiles)
    print(found["verdict"], *filter(None, [found["first"]]), out, sep="\n")
    return 0


def job_file(path):
    """The manifest itself, where a folder of samples is named."""
    path = as_path(path)
    return path / "manifest.json" if path.is_dir() else path


def _parser():
    parser = make_parser(__doc__.splitlines()[0])
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
    add(
        "--resamples",
        type=AtLeast(10),
        default=0,
        metavar="N",
        help="of pairs: their interval by bootstrap",
    )
    add("--inception", metavar="FILE", help="weights of the 2015 network, for images")
    add("--inception-b", metavar="FILE", help="B's, if it was another")
    add("--network", choices=list(WIDTHS), default="inception", help="of the features")
    add("--batch-size", type=COUNT, default=64, metavar="N")
    add("--overwrite", action="store_true")
    make = parser.add_argument_group("to make a bundle")
    add = make.add_argument
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


def _statistics(args, eye, a, b, pairs, reference):
    """-> paired.Gap and rows of swaps."""
    for each in (a, b):
        if each.samples is None:
            raise UserError(f"{each.path} has no images or features for --reference")
    chain = _chain(args, eye, a.samples, b.samples, pairs)
    final = chain[-1][1]
    sides = {id(side): side for _, side in chain}
    sets = {key: eye.features(side) for key, side in sides.items()}
    chain = [(name, sets[id(side)]) for name, side in chain]
    features = chain[-1][1]
    seeds = [paired.distance(eye.features(eye.open(path)), reference)
             for path in args.seeds]  # fmt: skip
    labels = diagnosis.labels_of(a, b)
    found = (chain[0][1], features, reference, pairs, seeds, labels, args.resamples)
    last = None
    if args.inception_b is not None:
        last = _by_another(args, final)
    elif args.reference_b:
        last = "reference", features, eye.gaussian(args.reference_b)
    return paired.compare(*found), paired.swaps(chain, reference, last)


def _by_another(args, side):
    """Returns what B's network makes of B's pictures and of the reference."""
    if args.network != "inception":
        raise UserError(f"--inception-b has no use beside --network {args.network}")
    eye = Evaluator(args.network, args.inception_b, args.batch_size)
    sides = [side] if args.reference_b else [side, eye.open(args.reference)]
    for each in sides:
        if each.statistics is not None or not each.source.needs_network:
            raise UserError(
                f"--inception-b {args.inception_b} judges pictures, and {each.path} "
                "has other things; give --reference-b or --features-b, made by it"
            )
    theirs = eye.gaussian(args.reference_b or args.reference)
    return "feature network", eye.features(side), theirs


def _chain(args, eye, a, b, pairs):
    """Inputs -> [(what was exchanged, input)] from A to B."""
    chain = exchanged_sides(a, b, pairs, eye.width, args.swapped)
    for text in args.swap:
        name, found, path = text.partition("=")
        if not found:
            raise UserError(f"--swap {text}: NAME=FEATURES.npz")
        chain.append((name, eye.open(path)))
    if args.features_b:
        return [*chain, ("features", open_input(args.features_b, only_features=True))]
    return chain if chain[-1][1] is b else [*chain, ("the rest: B", b)]


def _seen(args, evidence):
    """Evidence whose latents, if it has them and a VAE, are pictures."""
    known = evidence.path.suffix == ".npy" and evidence.manifest is not None
    if not (known and args.reference):
        return evidence
    images = decoded(evidence.path, evidence.manifest)
    samples = images and input_of_images(images, WIDTHS[args.network])
    return dataclasses.replace(evidence, samples=samples)


def _judge(args):
    """Returns the extractor of a bundle, or None without Inception's weights."""
    try:
        return Evaluator(args.network, args.inception, args.batch_size).extractor()
    except UserError as error:
        if args.inception:
            raise
        print(f"no features among the stages: {error}")
        return None


def _images(evidence):
    side = evidence.samples
    if side is None or side.source is None or isinstance(side.source, FileFeatures):
        return None
    return side.source.images


def _open(path, family=None, heads=None):
    return WeightsRef(path, family=family, heads=heads, base=published).open()
