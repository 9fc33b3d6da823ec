"""Encodes images once and for all: a folder of latents that train.py reads.

python extract_features.py --data DIR --vae sd-vae-ft-mse --size 256 --out latents
"""

import sys
import time
from functools import partial

from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.data.archives import ImageNetTar, WebdatasetTars
from sit_jax.data.cache import LatentCache
from sit_jax.data.cifar import CifarBinary, CifarFolder
from sit_jax.data.extraction import DTYPES, describe, extract
from sit_jax.data.folders import AdmFolder, ImageFolder
from sit_jax.data.pairs import from_pairs, to_pairs
from sit_jax.data.prepared import Tfds
from sit_jax.data.sources import LatentFolder
from sit_jax.errors import UserError, one_line
from sit_jax.files import local_path, require_writable, write_json
from sit_jax.manifest import environment
from sit_jax.parallel import multihost
from sit_jax.precision.policy import get_precision
from sit_jax.ranges import COUNT, SEED, AtLeast, Between
from sit_jax.trainer.compile import use_compilation_cache

KINDS = {
    "folder": lambda a: ImageFolder(a.data, a.size, broken_share=a.broken_share),
    "adm": lambda a: AdmFolder(a.data, a.size, broken_share=a.broken_share),
    "tar": lambda a: ImageNetTar(a.data, a.size, broken_share=a.broken_share),
    "webdataset": lambda a: WebdatasetTars(
        a.data, a.size, a.classes, broken_share=a.broken_share
    ),
    "tfds": lambda a: Tfds(
        a.data, a.split, a.size, a.tfds_dir, broken_share=a.broken_share
    ),
    "cifar": lambda a: CifarFolder(a.data, broken_share=a.broken_share),
    "cifar-binary": lambda a: CifarBinary(a.data),
}
PAIRS = {
    "fast-dit": "a folder of fast-DiT's .npy pairs becomes a cache",
    "cache": "a cache becomes a folder of fast-DiT's .npy pairs",
}
USUAL = (0.7, 1.4)  # the standard deviation of latents that fit their scale


@entry_point
def main():
    args, rest = parse_args(_parser())
    if rest:
        raise UserError(f"unknown argument {rest[0]!r}; see --help")
    require_writable(local_path(args.out) / "any")
    if args.kind in PAIRS:
        return convert(args)
    if not multihost.shares_work_only(args):
        multihost.initialize(args)
        use_compilation_cache()
    return run(args, load(args.vae, args.precision))


def run(args, codec):
    """Extracts, reports, checks; -> exit code."""
    process, count = _share(args)
    source = KINDS[args.kind](args)
    print(f"{len(source):,} images in {source.classes} classes: {_some(source)}")
    for remark in getattr(source, "remarks", ()):
        print(one_line(remark))
    tags = describe(source, codec, args.dtype, not args.no_flip, args.shards)
    begun = time.perf_counter()
    with Bar() as bar:
        done, about = extract(
            source,
            codec,
            args.out,
            tags,
            batch_size=args.batch_size,
            process=process,
            count=count,
            threads=args.threads,
            workers=args.workers,
            show=bar,
            say=bar.say,
        )
    seconds = time.perf_counter() - begun
    print(f"{done:,} images in {seconds:.1f} s, {done / seconds:.4g} images/s")
    if about is None:
        print(f"{args.out} waits for the shards of the other processes")
        return 0
    if multihost.is_primary():
        vae = {"path": args.vae, **codec.record()}
        write_json(f"{args.out}/manifest.json", {"vae": vae, **environment()})
    _check(about)
    print(
        f"{sum(about['images']):,} images in {args.out}, {len(about['broken'])} broken"
    )
    return 0


def convert(args):
    """fast-DiT's layout to ours, or back; -> exit code."""
    with Bar() as bar:
        if args.kind == "cache":
            done = to_pairs(
                LatentCache(args.data, flip=False), args.out, args.seed, show=bar
            )
        else:
            source = LatentFolder(args.data, args.classes)
            done, about = from_pairs(source, args.out, show=bar)
            _check(about)
    print(f"{done:,} latents in {args.out}")
    return 0


def load(vae, precision):
    """-> the codec of --vae."""
    if vae is None:
        raise UserError("--vae is missing: a folder, a file, or sd-vae-ft-mse")
    from sit_jax.convert import vae_files

    get_precision(precision)  # or it is refused, before anything is loaded
    return vae_files.load_vae(vae, precision)


def _parser():
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="images; a tar; a name for tfds")
    add("--kind", default="folder", choices=(*KINDS, *PAIRS), help=_kinds())
    add("--vae", metavar="PATH", help="the VAE's folder, file or name")
    add("--precision", default="exact", metavar="WORD", help="exact, fast or bf16")
    add("--size", type=AtLeast(8), default=256, metavar="PIXELS")
    add("--out", required=True, metavar="DIR", help="the same one goes on after a kill")
    add("--batch-size", type=COUNT, default=64, metavar="N", help="on this process")
    add("--dtype", choices=DTYPES, default="float32", help="of what is stored")
    add("--no-flip", action="store_true", help="only one view of each image: half size")
    add("--shards", type=COUNT, metavar="N", help="files; default: up to 256")
    add("--threads", type=COUNT, default=4, metavar="N", help="that read ahead")
    add("--workers", type=AtLeast(0), default=0, metavar="N", help="that decode")
    share = Between(0.0, 1.0)
    add("--broken-share", type=share, default=0.001, help="of images; more stop it")
    add("--classes", type=COUNT, default=1000, help="for webdataset and fast-dit")
    add("--split", default="train", help="for tfds")
    add("--tfds-dir", metavar="DIR", help="for tfds; default: its own")
    add(
        "--seed",
        type=SEED,
        default=0,
        help="of draws and flips, for --kind cache",
    )
    multihost.add_flags(parser)
    return parser


def _share(args):
    """-> which process this is, of how many that share the work."""
    if multihost.shares_work_only(args):
        return args.process, args.processes
    return multihost.process_index(), multihost.process_count()


def _kinds():
    said = "; ".join(f"{name}: {words}" for name, words in PAIRS.items())
    return f"the layout of --data: {', '.join(KINDS)}; {said}"


def _some(source):
    names = source.class_names
    return ", ".join(names[:3]) + (", .." if len(names) > 3 else "")


def _check(about):
    """Prints the latents' mean and standard deviation; says so if they are odd."""
    mean, std = about["latents"]["mean"], about["latents"]["std"]
    each = lambda values: ", ".join(f"{value:.3f}" for value in values)
    print(f"scaled latents by channel: mean {each(mean)}; deviation {each(std)}")
    least, most = USUAL
    if odd := [value for value in std if not least <= value <= most]:
        print(
            f"warning: a standard deviation of {odd[0]:.3g} is far from 1: another VAE "
            "or scale, or images of one kind only?",
            file=sys.stderr,
        )


class Bar:
    """A progress bar with images/s and the time to go; made at the first batch."""

    def __init__(self):
        self._bar = None

    def __enter__(self):
        return self

    def __call__(self, images, of):
        from tqdm import tqdm

        if self._bar is None:
            interval = 0.5 if sys.stderr.isatty() else 30
            make = partial(tqdm, unit=" images", smoothing=0.05, mininterval=interval)
            self._bar = make(total=of)
        self._bar.update(images)

    def say(self, line):
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)

    def __exit__(self, *error):
        if self._bar is not None:
            self._bar.close()


if __name__ == "__main__":
    main()
