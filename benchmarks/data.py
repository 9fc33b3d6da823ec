"""How fast data is read, per core, beside what a GPU eats and what Pillow does.

python benchmarks/data.py [--images DIR] [--vae PATH]

One H100 at 50 % of its peak trains SiT-XL/2 on 700 latents a second (3 forward passes
of 2 x 118 GFLOP an image, 989 TFLOP/s). Rates are per second of CPU time, so that other
programs on the machine do not count; files are in the page cache.
"""

import argparse
import itertools
import sys
import tempfile
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from sit_jax.data.folders import ImageFolder
from sit_jax.data.latent_cache import (
    CacheMetadata,
    EncodedImages,
    LatentCache,
    begin_cache,
    finish_cache,
    missing_shards,
    write_shard,
)
from sit_jax.data.loader import local_batches, prefetch, read_next, read_records
from sit_jax.data.sources import DataSource

DEMAND, GOAL = 700, 14_000  # records a second: what an H100 takes; at least
REPEATS = 20  # the best of which counts; short ones, between the neighbours' work


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", metavar="DIR", help="an ImageFolder to decode")
    vae = "also measures extraction; random: one of sd-vae-ft-mse's size"
    parser.add_argument("--vae", metavar="PATH", help=vae)
    parser.add_argument("--size", type=int, default=256, help="of images for the VAE")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in ("float32", "float16"):
            time_caches(Path(scratch) / dtype, dtype)
        images = args.images or make_photographs(Path(scratch) / "images")
        time_decoding(images)
        time_sharing(images)
        if args.vae:
            time_extraction(images, args.vae, Path(scratch) / "latents", args.size)


class Repeated(DataSource):
    """A cache of as many images as ImageNet: grain shuffles few of them slower."""

    def __init__(self, cache):
        self.cache, self.shape, self.classes = cache, cache.shape, cache.classes
        self.flip = True

    def __len__(self):
        return 1_281_167

    def __getitem__(self, i):
        return self.cache[i % len(self.cache)]

    def flipped(self, i):
        return self.cache.flipped(i % len(self.cache))


def time_caches(path, dtype, count=1024, batch=256):
    """Records of 32 x 32 x 8, shuffled, flipped, read, checked and batched."""
    cache, steps = make_cache(path, dtype, count), 2
    batches = local_batches(cache, batch, 0, 0, range(batch))
    rate = steps * batch / best(lambda: [batches[step] for step in range(steps)])
    print(
        f"latent cache, {dtype}: {rate:,.0f} records/s per core, {rate / GOAL:.2f} x "
        f"the goal of {GOAL:,}, {rate / DEMAND:.1f} x the {DEMAND} of one H100"
    )


def time_decoding(folder, size=256, count=50):
    """ImageFolder's records beside a loop that does the least with Pillow."""
    source = ImageFolder(folder, size=size)
    ids = np.random.default_rng(0).permutation(len(source))[:count].tolist()
    ours = lambda: read_records(source, ids, np.zeros(len(ids), bool))
    plain = partial(plain_loop, [source.name(i) for i in ids], size)
    slow, fast = alternately(ours, plain)
    print(
        f"ImageFolder to {size}: {len(ids) / slow:,.0f} images/s per core, "
        f"{fast / slow:.2f} x a plain Pillow loop (goal: 0.9)"
    )


def time_sharing(folder, size=256, batch=16, count=20):
    """Threads beside processes, by the clock: an idle machine is needed."""
    source, rates = ImageFolder(folder, size=size), []
    steps = local_batches(source, batch, 0, 0, range(batch))
    for n in (1, 2):
        for settings in ({"threads": n}, {"threads": 1, "workers": n}):
            with closing(prefetch(steps, **settings)) as batches:
                read_next(batches)  # the processes have begun
                begun = time.perf_counter()
                for _ in itertools.repeat(None, count):
                    read_next(batches)
                rates.append(count * batch / (time.perf_counter() - begun))
    print(
        "images/s by the clock in threads and in processes: {:,.0f} and {:,.0f} in one,"
        " {:,.0f} and {:,.0f} in two".format(*rates)
    )


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


def time_extraction(folder, vae, out, size, batch=8):
    """extract() beside the encoder alone, by the clock and by CPU time.

    Both use all cores, so the clock's ratio needs an idle machine; that of CPU time
    says what is done besides encoding, if none of it waits.
    """
    import jax
    from vae import codec as random

    from sit_jax.convert.vae import load_vae
    from sit_jax.data.extract import ExtractOptions, describe, extract, make_encoder
    from sit_jax.models.vae import AutoencoderKL

    codec = random(AutoencoderKL(), "exact") if vae == "random" else load_vae(vae)
    source = ImageFolder(folder, size=size)
    metadata = describe(source, codec)
    encoder = make_encoder(codec, metadata, batch)
    images = np.stack([source[i]["image"] for i in range(batch)])
    jax.block_until_ready(encoder(images))
    now = lambda: np.array([time.perf_counter(), time.process_time()])
    begun = now()
    for _ in range(len(source) // batch):
        last = jax.block_until_ready(encoder(images))
    alone = len(source) // batch * batch / (now() - begun)
    del last
    begun = now()
    done, _ = extract(source, codec, out, metadata, ExtractOptions(batch_size=batch))
    rate = done / (now() - begun)
    clock, cpu = rate / alone
    print(
        f"extraction: {rate[0]:.3g} images/s in both views, {clock:.2f} x the encoder "
        f"alone by the clock, {cpu:.2f} x by CPU time (goal: 0.9)"
    )


def make_cache(path, dtype, count):
    metadata = CacheMetadata(
        kind="moments",
        shape=(32, 32, 8),
        dtype=dtype,
        views=2,
        records=count,
        classes=1000,
        shards=4,
    )
    path, rng = begin_cache(path, metadata), np.random.default_rng(0)
    for number in missing_shards(path, metadata):
        ids = metadata.shard_ids(number)
        shape = (2, len(ids), *metadata.shape)
        views = rng.standard_normal(shape, np.float32).astype(dtype)
        images = EncodedImages(ids, [i % 1000 for i in ids], views)
        write_shard(path, metadata, number, [images])
    finish_cache(path, metadata, map(str, range(1000)))
    return Repeated(LatentCache(path))


def make_photographs(path, count=64):
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
    """Returns the least CPU seconds of some runs, after one that does not count."""
    return alternately(run)[0]


def alternately(*runs):
    """Returns the least CPU seconds of each; in turns: all see the same machine."""
    seconds = [[] for _ in runs]
    for _ in range(REPEATS + 1):
        for run, taken in zip(runs, seconds, strict=True):
            begun = time.process_time()
            run()
            taken.append(time.process_time() - begun)
    return [min(taken[1:]) for taken in seconds]


if __name__ == "__main__":
    main()
