"""Does hiding tokens help? MDTv2 against its own body without, and against DiT.

python benchmarks/masking.py --out masking.json
12 CPU minutes; docs/evidence/results.md has the table.

On the digits of scikit-learn: networks of the same depth and width, the same optimizer,
steps, batches and seeds, one program a network. At a few steps of each run the average
of its weights is asked for the squared error of the noise on held-out digits and for
samples, whose Frechet distance to held-out digits is evaluate.py's for digits.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.data.sources import Digits
from sit_jax.diffusion import rng
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.loss_weights import mdt_min_snr_loss
from sit_jax.evaluation.digits import digit_figures
from sit_jax.files import atomic_write
from sit_jax.models.codec import Pixels
from sit_jax.models.dit import DiT
from sit_jax.models.mdt import MDTv2
from sit_jax.samplers.ddpm import DDPM
from sit_jax.training.optimizers import adan
from sit_jax.training.state import TrainState, init_params
from sit_jax.training.step import make_train_step

SHAPE = (8, 8, 1)


class TwoPlain(MDTv2):
    """As many passes as with masks, without any."""

    @nn.nowrap
    def pass_inputs(self, key, shape):
        return {"": {}, "m_": {}}


def networks(depth, width, heads):
    sizes = dict(depth=depth, width=width, heads=heads, classes=10)
    return {
        "DiT": DiT(**sizes),
        "MDTv2, plain pass": MDTv2(**sizes, decoder=2, mask_ratio=None),
        "MDTv2, two plain passes": TwoPlain(**sizes, decoder=2, mask_ratio=None),
        "MDTv2, plain and masked": MDTv2(**sizes, decoder=2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", required=True, metavar="X.json")
    add("--depth", type=int, default=4)
    add("--width", type=int, default=32)
    add("--heads", type=int, default=4)
    add("--steps", type=int, default=450)
    add("--every", type=int, default=150, help="steps between measurements")
    add("--batch", type=int, default=32)
    add("--seeds", type=int, default=3)
    add("--samples", type=int, default=300)
    args = parser.parse_args()
    found = {}
    for name, model in networks(args.depth, args.width, args.heads).items():
        run = runner(model, args)
        found[name] = [run(seed) for seed in range(args.seeds)]
        with atomic_write(args.out) as path:
            path.write_text(json.dumps({"args": vars(args), "found": found}, indent=1))
        print(table(name, found[name]), flush=True)


def runner(model, args):
    """Returns a function of a seed that gives a list of measurements."""
    tx, process = adan(2e-3), GaussianDiffusion(objective=mdt_min_snr_loss)
    begin = lambda key: TrainState.create(init_params(model, SHAPE, key), tx)
    init = jax.jit(begin)
    step = make_train_step(model, process, tx, ema_decay=0.99)
    step = jax.jit(step, donate_argnums=0)
    images, held_out = Digits(train=True), Digits(train=False)
    encode = lambda digits: np.float32(digits.images) / 127.5 - 1
    latents, error = (
        encode(images),
        error_of(model, process, encode(held_out), held_out),
    )
    labels = np.arange(args.samples) % 10
    drawn = sampler(model, process, labels)

    def run(seed):
        rng, state = np.random.default_rng(seed), init(jax.random.key(seed))
        key, records, seconds = jax.random.key(100 + seed), [], []
        for at in range(1, args.steps + 1):
            rows = rng.integers(len(latents), size=args.batch)
            batch = {"latent": latents[rows], "label": images.labels[rows]}
            begun = time.perf_counter()
            state, metrics = jax.block_until_ready(step(state, Pixels(), batch, key))
            seconds.append(time.perf_counter() - begun)
            if at % args.every == 0:
                pictures = np.asarray(Pixels().decode(drawn(state.ema["ema"], seed)))
                figures = digit_figures(pictures, labels)
                records.append(
                    {
                        "step": at,
                        "error": float(error(state.ema["ema"])),
                        "frechet": figures["frechet_samples"],
                        "recognised": figures["samples_recognised"],
                        "step_seconds": float(np.median(seconds)),
                    }
                )
        return records

    return run


def error_of(model, process, data, held_out):
    """Returns params -> mean squared error of the noise, of the same draws for all."""
    key = jax.random.split(jax.random.key(7))
    t = process.sample_times(key[0], len(data))
    start = jax.random.normal(key[1], data.shape)

    @jax.jit
    def error(params):
        net = lambda x, t: model.apply({"params": params}, x, t, held_out.labels)
        return GaussianDiffusion().losses(net, data, start, t)["mse"].mean()

    return error


def sampler(model, process, labels):
    """Returns (params, seed) -> a sample of each label, of 25 steps, unguided."""

    @jax.jit
    def drawn(params, seed):
        keys = rng.image_keys(seed, jnp.arange(len(labels)))
        net = lambda x, t: model.apply({"params": params}, x, t, jnp.asarray(labels))
        draw, start = rng.step_noise(keys, SHAPE), rng.initial_noise(keys, SHAPE)
        return DDPM(steps=25)(net, process, start, draw).data

    return drawn


def table(name, runs):
    """Means over the seeds, and how far the seeds are apart."""
    lines = [name]
    for records in zip(*runs, strict=True):
        words = [f"  step {records[0]['step']:4d}"]
        for field in ("error", "frechet", "recognised"):
            values = [record[field] for record in records]
            words.append(f"{field} {np.mean(values):.4f} +- {np.ptp(values) / 2:.4f}")
        words.append(f"{np.mean([r['step_seconds'] for r in records]) * 1e3:.0f} ms")
        lines.append("  ".join(words))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
