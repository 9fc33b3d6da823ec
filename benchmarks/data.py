"""How fast data is read, per core, beside what a GPU eats and what Pillow does.

python benchmarks/data.py [--images DIR] [--vae PATH]

One H100 at 50 % of its peak trains SiT-XL/2 on 700 latents a second (3 forward passes
of 2 x 118 GFLOP an image, 989 TFLOP/s). Rates are per second of CPU time, so that other
programs on the machine do not count; files are in the page cache.
"""

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from sit_jax.data.cache import LatentCache
from sit_jax.data.coins import coins
from sit_jax.data.feed import order
from sit_jax.data.filling import finish, missing, open_plan, shard
from sit_jax.data.folders import ImageFolder
from sit_jax.data.reading import read
from sit_jax.data.tags import Tags
from sit_jax.data.workers import Workers

DEMAND = 700  # records a second
REPEATS = 20  # the best of which counts; short ones, between the neighbours' work


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", metavar="DIR", help="an ImageFolder to decode")
    said = "also measures extraction; random: one of sd-vae-ft-mse's size"
    parser.add_argument("--vae", metavar="PATH", help=said)
    parser.add_argument("--size", type=int, default=256, help="of images for the VAE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in ("float32", "float16"):
            caches(Path(scratch) / dtype, dtype)
        images = args.images or photographs(Path(scratch) / "images")
        decoding(images)
        sharing(images)
        if args.vae:
            extraction(images, args.vae, Path(scratch) / "latents", args.size)


def caches(path, dtype, count=1024, batch=256):
    """Records of 32 x 32 x 8, read, shuffled, flipped, checked and batched."""
    cache = make_cache(path, dtype, count)
    ids, steps = order(1_281_167, 0), 2  # grain's shuffle of few records is slower

    def run():
        for step in range(steps):
            positions = range(step * batch, step * batch + batch)
            some = [int(ids[position]) % count for position in positions]
            read(cache, some, coins(0, positions))

    rate = steps * batch / best(run)
    print(
        f"latent cache, {dtype}: {rate:,.0f} records/s per core, "
        f"{rate / DEMAND:.1f} x the {DEMAND} of one H100 (goal: 20)"
    )


def decoding(folder, size=256, count=50):
    """ImageFolder's records beside a loop that does the least with Pillow."""
    source = ImageFolder(folder, size)
    ids = np.random.default_rng(0).permutation(len(source))[:count].tolist()
    ours = lambda: read(source, ids, np.zeros(len(ids), bool))
    plain = partial(plain_loop, [source.name(i) for i in ids], size)
    slow, fast = alternately(ours, plain)
    print(
        f"ImageFolder to {size}: {len(ids) / slow:,.0f} images/s per core, "
        f"{fast / slow:.2f} x a plain Pillow loop (goal: 0.9)"
    )


def sharing(folder, size=256, count=100):
    """Threads beside processes, by the clock: an idle machine is needed."""
    source = ImageFolder(folder, size)
    ids = (np.arange(count) * 7919) % len(source)
    plain = np.zeros(count, bool)
    said = []
    for n in (1, 2):
        with ThreadPoolExecutor(n) as pool:
            parts = np.array_split(ids, 2 * n)
            some = lambda part: read(source, part, plain[: len(part)])
            threads = clocked(lambda: list(pool.map(some, parts)))  # noqa: B023
        workers = Workers(source, n)
        processes = clocked(lambda: workers(ids, plain))  # noqa: B023
        workers.close()
        said.append(f"{n}: {count / threads:,.0f} in threads, {count / processes:,.0f}")
    print(f"images/s by the clock, {', '.join(said)} in processes")


def clocked(run):
    """-> least seconds of some runs, after one that does not count."""
    taken = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begun)
    return min(taken[1:])


def plain_loop(names, size):
    """Open, convert, halve, scale, crop: the original scripts' rule and no more."""
    from PIL import Image

    cropped = []
    for name in names:
        with Image.open(name) as file:
            image = file.convert("RGB")
        while min(image.size) >= 2 * size:
            half = (image.width // 2, image.height // 2)
            image = image.resize(half, Image.Resampling.BOX)
        scale = size / min(image.size)
        wanted = (round(image.width * scale), round(image.height * scale))
        array = np.asarray(image.resize(wanted, Image.Resampling.BICUBIC))
        y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
        cropped.append(array[y : y + size, x : x + size])
    return np.stack(cropped)


def extraction(folder, vae, out, size, batch=8):
    """extract() beside the encoder alone, by the clock and by CPU time.

    Both use all cores, so the clock's ratio needs an idle machine; that of CPU time
    says what is done besides encoding, if none of it waits.
    """
    import jax
    from vae import codec as random

    from sit_jax.convert.vae_files import load_vae
    from sit_jax.data.extraction import Encoder, describe, extract
    from sit_jax.models.vae import AutoencoderKL

    codec = random(AutoencoderKL(), "exact") if vae == "random" else load_vae(vae)
    source = ImageFolder(folder, size)
    tags = describe(source, codec)
    encoder = Encoder(codec, tags, batch)
    images = np.stack([source[i]["image"] for i in range(batch)])
    jax.block_until_ready(encoder(images))
    now = lambda: np.array([time.perf_counter(), time.process_time()])
    begun = now()
    for _ in range(len(source) // batch):
        last = jax.block_until_ready(encoder(images))
    alone = len(source) // batch * batch / (now() - begun)
    del last
    begun = now()
    done, _ = extract(source, codec, out, tags, batch)
    rate = done / (now() - begun)
    clock, cpu = rate / alone
    print(
        f"extraction: {rate[0]:.3g} images/s in both views, {clock:.2f} x the encoder "
        f"alone by the clock, {cpu:.2f} x by CPU time (goal: 0.9)"
    )


def make_cache(path, dtype, count):
    unknown = dict.fromkeys(("encoder_sha256", "precision", "scale", "crop"))
    unknown |= dict.fromkeys(("size", "listing_sha256"))
    tags = Tags(
        kind="moments",
        shape=(32, 32, 8),
        dtype=dtype,
        views=2,
        records=count,
        classes=1000,
        shards=4,
        **unknown,
    )
    path, rng = open_plan(path, tags), np.random.default_rng(0)
    for number in missing(path, tags, 0, 1):
        with shard(path, tags, number) as filled:
            ids = tags.shard(number)[1]
            shape = (2, len(ids), *tags.shape)
            views = rng.standard_normal(shape, np.float32).astype(dtype)
            filled.add(ids, [i % 1000 for i in ids], views)
    finish(path, tags, map(str, range(1000)))
    return LatentCache(path)


def photographs(path, count=64):
    """JPEGs of ImageNet's usual size, 500 x 375, with about as many bytes: 110,000."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = rng.integers(0, 256, (24, 32, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth) + rng.normal(0, 14, (375, 500, 3))
        file = path / str(i % 4) / f"{i}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        image.save(file, quality=85)
    return path


def best(run):
    """-> least CPU seconds of some runs, after one that does not count."""
    return alternately(run)[0]


def alternately(*runs):
    """-> least CPU seconds of each; in turns, so that all see the same machine."""
    taken = [[] for _ in runs]
    for _ in range(REPEATS + 1):
        for run, seconds in zip(runs, taken, strict=True):
            begun = time.process_time()
            run()
            seconds.append(time.process_time() - begun)
    return [min(seconds[1:]) for seconds in taken]


if __name__ == "__main__":
    main()
