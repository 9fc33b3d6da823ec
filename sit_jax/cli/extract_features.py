"""Encodes images once and for all: a folder of latents that train.py reads.

python extract_features.py --data DIR --vae sd-vae-ft-mse --size 256 --out latents
"""

import inspect
import sys
import time
from functools import partial

from tqdm import tqdm

from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.convert.vae import load_vae
from sit_jax.data.archives import ImageNetTar, Tfds, WebdatasetTars
from sit_jax.data.extract import ExtractOptions, describe, extract
from sit_jax.data.folders import AdmFolder, CifarFolder, ImageFolder
from sit_jax.data.latent_cache import DTYPES, import_fast_dit
from sit_jax.data.sources import LatentFolder
from sit_jax.errors import UserError, one_line
from sit_jax.files import local_path, require_writable, write_json
from sit_jax.manifest import environment
from sit_jax.parallel import multihost
from sit_jax.precision.policy import PRECISIONS
from sit_jax.ranges import COUNT, AtLeast, Between
from sit_jax.trainer.compile import use_compilation_cache

KINDS = {
    "folder": ImageFolder,
    "adm": AdmFolder,
    "tar": ImageNetTar,
    "webdataset": WebdatasetTars,
    "tfds": Tfds,
    "cifar": CifarFolder,
}
FAST_DIT = "fast-dit"
USUAL_STD = (0.7, 1.4)  # of latents that fit their scale


@entry_point
def main():
    """Runs extract_features.py with the arguments of the process."""
    args, _ = parse_args(_parser())
    require_writable(local_path(args.out) / "any")
    if args.kind == FAST_DIT:
        return import_latents(args)
    if not multihost.shares_work_only(args):
        multihost.initialize(args)
        use_compilation_cache()
    return run(args, load_codec(args.vae, args.precision))


def run(args, codec) -> int:
    """Extracts the moments of images, reports and checks them; returns an exit code."""
    source = make_source(args)
    names = ", ".join(source.class_names[:3]) + ", .." * (source.classes > 3)
    print(f"{len(source):,} images in {source.classes} classes: {names}")
    for remark in source.remarks:
        print(one_line(remark))
    metadata = describe(source, codec, args.dtype, not args.no_flip, args.shards)
    apart = multihost.shares_work_only(args)
    begun = time.perf_counter()
    with progress_bar() as bar:
        options = ExtractOptions(
            batch_size=args.batch_size,
            process=args.process if apart else multihost.process_index(),
            count=args.processes if apart else multihost.process_count(),
            threads=args.threads,
            workers=args.workers,
            say=partial(bar.write, file=sys.stderr),
            show=partial(advance, bar),
        )
        images, about = extract(source, codec, args.out, metadata, options)
    seconds = time.perf_counter() - begun
    print(f"{images:,} images in {seconds:.1f} s, {images / seconds:.4g} images/s")
    if about is None:
        print(f"{args.out} waits for the shards of the other processes")
        return 0
    if multihost.is_primary():
        vae = {"path": args.vae, **codec.record()}
        write_json(f"{args.out}/manifest.json", {"vae": vae, **environment()})
    _report_statistics(about)
    images, corrupt = sum(about["images"]), len(about["broken"])
    print(f"{images:,} images in {args.out}, {corrupt} corrupt")
    return 0


def import_latents(args) -> int:
    """Makes a cache of fast-DiT's folder; returns an exit code."""
    source = LatentFolder(args.data, args.classes)
    with progress_bar() as bar:
        about = import_fast_dit(source, args.out, show=partial(advance, bar))
    _report_statistics(about)
    print(f"{sum(about['images']):,} latents in {args.out}")
    return 0


def make_source(args):
    """Returns the source of images of --kind, with those arguments that it has."""
    make = KINDS[args.kind]
    names = inspect.signature(make).parameters
    fields = {name: value for name, value in vars(args).items() if name in names}
    return make(args.data, **fields)


def load_codec(vae, precision):
    """Returns the codec of --vae."""
    if vae is None:
        raise UserError("--vae is missing: a folder, a file, or sd-vae-ft-mse")
    return load_vae(vae, precision)


def _parser():
    parser = make_parser(__doc__.splitlines()[0], has_config=False)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="images; a tar; a name for tfds")
    kinds = f"the layout of --data; {FAST_DIT}: its folder of .npy becomes a cache"
    add("--kind", default="folder", choices=(*KINDS, FAST_DIT), help=kinds)
    add("--vae", metavar="PATH", help="the VAE's folder, file or name")
    add("--precision", default="exact", choices=PRECISIONS, help="of the VAE")
    add("--size", type=AtLeast(8), default=256, metavar="PIXELS")
    add("--out", required=True, metavar="DIR", help="the same one goes on after a kill")
    add("--batch-size", type=COUNT, default=64, metavar="N", help="on this process")
    add("--dtype", choices=DTYPES, default="float32", help="of what is stored")
    add("--no-flip", action="store_true", help="only one view of each image: half size")
    add("--shards", type=COUNT, metavar="N", help="files; default: up to 256")
    add("--threads", type=COUNT, default=4, metavar="N", help="that read ahead")
    add("--workers", type=AtLeast(0), default=0, help="processes that decode")
    flags = ("--max-corrupt-fraction", "--broken-share")  # the latter of version 0.1
    fraction = {"type": Between(0.0, 1.0), "default": 0.001, "metavar": "X"}
    add(*flags, **fraction, help="of images; if more are corrupt, it ends")
    add("--classes", type=COUNT, default=1000, help=f"for webdataset and {FAST_DIT}")
    add("--split", default="train", help="for tfds")
    add("--tfds-dir", dest="data_dir", metavar="DIR", help="default: tfds's own")
    multihost.add_flags(parser)
    return parser


def _report_statistics(about):
    """Prints the latents' mean and standard deviation; says so if they are unusual."""
    mean, std = about["latents"]["mean"], about["latents"]["std"]
    joined = lambda values: ", ".join(f"{value:.3f}" for value in values)
    print(f"scaled latents by channel: mean {joined(mean)}; deviation {joined(std)}")
    least, most = USUAL_STD
    if unusual := [value for value in std if not least <= value <= most]:
        print(
            f"warning: a standard deviation of {unusual[0]:.3g} is far from 1: another "
            "VAE or scale, or images of one kind only?",
            file=sys.stderr,
        )


def progress_bar() -> tqdm:
    """Returns a bar with images/s and the time to go, unseen before the first batch."""
    interval = 0.5 if sys.stderr.isatty() else 30
    return tqdm(unit=" images", smoothing=0.05, mininterval=interval, delay=1e-9)


def advance(bar: tqdm, images: int, total: int) -> None:
    """Counts images done, of `total` in all."""
    bar.total = total
    bar.update(images)


if __name__ == "__main__":
    main()
