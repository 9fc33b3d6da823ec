"""Time of MDT's plain and masked pass in one step against two plain steps.

python benchmarks/masked_step.py --depth 28 --decoder 4 --width 128 --batch 4

At most 0.9 is wanted on a CPU. The blocks alone, without what the two have in common,
would give the share that is printed as multiply-adds: step_macs over two plain passes.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

from sit_jax.adan import adan
from sit_jax.codec import Pixels
from sit_jax.diffusion import Diffusion
from sit_jax.min_snr import min_snr
from sit_jax.models import mdt
from sit_jax.models.mdt_cost import macs as plain_macs
from sit_jax.models.mdt_cost import step_macs
from sit_jax.training import init_state, make_train_step

KINDS = {"mdt": mdt.MDT, "mdtv2": mdt.MDTv2}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kind", choices=KINDS, default="mdtv2")
    add("--depth", type=int, default=28)
    add("--decoder", type=int, default=4)
    add("--width", type=int, default=128)
    add("--heads", type=int, default=2)
    add("--side", type=int, default=32, help="of the latents; patches are 2 x 2")
    add("--batch", type=int, default=4)
    add("--rounds", type=int, default=5)
    add("--dtype", default="float32", choices=("float32", "bfloat16"))
    add("--remat", default="none", help="as in model.remat")
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in ("depth", "width", "heads")}
    model = KINDS[args.kind](
        **sizes, decoder=args.decoder, dtype=args.dtype, remat=args.remat
    )
    shape = (args.side, args.side, 4)
    both = runner(model, shape, args.batch)
    plain = runner(model.clone(hide=None), shape, args.batch)
    pairs = [(both(1), plain(2)) for _ in range(args.rounds)]  # side by side
    ratio = statistics.median(one / two for one, two in pairs)
    one, two = (statistics.median(times) for times in zip(*pairs, strict=True))
    macs = step_macs(model, shape) / (2 * plain_macs(model, shape))
    print(
        f"{type(model).__name__} {sizes}, decoder {args.decoder}, {args.batch} x "
        f"{shape} on {jax.devices()[0].device_kind}: plain and masked pass {one:.3f} "
        f"s, two plain steps {two:.3f} s, ratio {ratio:.3f} (multiply-adds {macs:.3f})"
    )


def runner(model, shape, batch):
    """-> time(n), the seconds of n training steps, compiled and warm."""
    tx = adan(1e-4)
    state = jax.jit(partial(init_state, model, tx, shape))(jax.random.key(0))
    rng = np.random.default_rng(0)
    data = {
        "latent": rng.standard_normal((batch, *shape), np.float32),
        "label": rng.integers(1000, size=batch).astype(np.int32),
    }
    step = make_train_step(model, Diffusion(objective=min_snr), tx)
    step, key = jax.jit(step, donate_argnums=0), jax.random.key(1)
    state, _ = jax.block_until_ready(step(state, Pixels(), data, key))

    def seconds(n):
        nonlocal state
        begun = time.perf_counter()
        for _ in range(n):
            state, _ = step(state, Pixels(), data, key)
        jax.block_until_ready(state)
        return time.perf_counter() - begun

    return seconds


if __name__ == "__main__":
    main()
