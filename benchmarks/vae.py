"""How fast the VAE encodes and decodes, beside diffusers' on the same processor.

python benchmarks/vae.py [--size 256] [--batch 2] [--channels 128,256,512,512]

Without diffusers (pip install diffusers, into another environment) it runs alone. Both
take turns and the best of each counts; ratios are given by the clock and by CPU time,
for other programs on the machine spoil the former.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from sit_jax.convert.rules import to_torch, vae_rules
from sit_jax.models.codec import Vae
from sit_jax.models.vae import AutoencoderKL
from sit_jax.precision.policy import PRECISIONS, with_compute_dtype


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--size", type=int, default=256, help="pixels of the square images")
    add("--batch", type=int, default=2, help="images at a time")
    add("--channels", default="128,256,512,512", help="of each resolution")
    add("--groups", type=int, default=32, help="of channels in a norm")
    add("--precision", choices=tuple(PRECISIONS), default="exact")
    add("--repeats", type=int, default=5)
    args = parser.parse_args()
    channels = tuple(map(int, args.channels.split(",")))
    model = AutoencoderKL(channels=channels, groups=args.groups)
    rng = np.random.default_rng(0)
    shape = (args.batch, args.size, args.size, 3)
    images = rng.integers(0, 256, shape).astype(np.uint8)
    side = args.size // model.factor
    latents = rng.normal(size=(args.batch, side, side, 4)).astype(np.float32)
    vae = codec(model, args.precision)
    theirs = diffusers(channels, args.groups, vae)
    print(f"{jax.devices()[0].device_kind}, {args.batch} images of {args.size} pixels")
    for name, x in (("encode", images), ("decode", latents)):
        runs = {
            "sit_jax": lambda m=name, x=x: jax.block_until_ready(getattr(vae, m)(x))
        }
        if theirs:
            runs["diffusers"] = lambda m=name, x=x: theirs[m](x)
        report(name, args.batch, times(runs, args.repeats))


def codec(model, word, seed=0):
    """A Vae with random weights, nowhere zero."""
    image = np.zeros((1, model.factor, model.factor, 3), np.float32)
    like = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(seed)

    def draw(leaf):
        spread = leaf.shape and np.prod(leaf.shape[:-1]) ** -0.5
        return (rng.standard_normal(leaf.shape) * spread).astype(np.float32)

    precision = PRECISIONS[word]
    params = jax.device_put(jax.tree.map(draw, like))
    return Vae(params, with_compute_dtype(precision, model), precision=precision)


def diffusers(channels, groups, vae):
    """Returns encode and decode of diffusers' AutoencoderKL with the same weights."""
    try:
        import torch
        from diffusers import AutoencoderKL as Theirs
    except ImportError as error:
        print(f"alone: {error}")
        return None
    model = Theirs(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        norm_num_groups=groups,
    ).eval()
    state = to_torch(vae_rules(vae.model), jax.tree.map(np.asarray, vae.params))
    model.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()})
    nchw = lambda x: torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))

    @torch.no_grad()
    def encode(images):
        return model.encode(nchw(images).float() / 127.5 - 1).latent_dist.parameters

    @torch.no_grad()
    def decode(latents):
        images = model.decode(nchw(latents) / 0.18215).sample
        return torch.clamp(127.5 * images + 128, 0, 255).to(torch.uint8)

    return {"encode": encode, "decode": decode}


def times(runs, repeats):
    """Measures the least seconds by the clock, and of CPU time, by name."""
    found = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            begun = time.perf_counter(), time.process_time()
            run()
            ended = time.perf_counter(), time.process_time()
            if turn:  # the first compiles
                found[name].append([b - a for a, b in zip(begun, ended, strict=True)])
    return {name: tuple(np.min(each, axis=0)) for name, each in found.items()}


def report(name, count, found):
    for who, (clock, _) in found.items():
        print(f"{name} {who:>9}: {count / clock:.3g} images/s")
    if len(found) == 2:
        clock, cpu = np.divide(found["diffusers"], found["sit_jax"])
        print(f"{name}: {clock:.2f} times diffusers' rate, {cpu:.2f} by CPU time")


if __name__ == "__main__":
    main()
