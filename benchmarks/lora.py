"""A step of adapters beside a full step, and sampling with them merged and not.

python benchmarks/lora.py [--size S] [--batch 4] [--reference DIR] [--json FILE]

DIR holds a models.py of SiT in torch (a clone, or tests/plain_torch); it needs torch
and peft, whose adapters then take the same steps in the same run. Random weights,
256 px latents, float32, rank 16 on attention and MLPs, AdamW. Memory is what XLA
reckons for the compiled step: arguments and temporaries. Medians of the repeats. On a
CPU both sides are quicker with huge pages: set what train_step.py has as HUGE_PAGES.
"""

import argparse
import functools
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs.lora_xl2 import get_config
from sit_jax.adapters.apply import apply_model
from sit_jax.adapters.weights import merge_adapters, quantize_int8, replace_weights
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.experiment import build_experiment
from sit_jax.models.codec import Latents
from sit_jax.models.dit import SIZES, SiT
from sit_jax.models.layers import REMAT
from sit_jax.training.state import TrainState, init_params
from sit_jax.training.step import make_train_step

SHAPE = (32, 32, 4)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="S", choices=SIZES)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--remat", default="none", choices=REMAT)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--reference", metavar="DIR", help="models.py of SiT in torch")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    adapter = build_experiment(get_config()).adapter
    model = SiT(patch=2, remat=args.remat, **SIZES[args.size])
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(
        functools.partial(init_params, model, SHAPE), jax.random.key(0)
    )
    draw = lambda x: jnp.asarray(0.05 * rng.standard_normal(x.shape), jnp.float32)
    params = jax.tree.map(draw, shapes)
    adapted = adapter.add_adapters(params, jax.random.key(0))
    int8 = adapter(
        replace_weights(params, ".*blocks/.*", quantize_int8), jax.random.key(0)
    )
    runs = {
        "full step": lambda: step(model, params, args),
        "LoRA step": lambda: step(model, adapted, args),
        "forward, merged": lambda: forward(model, merge_adapters(adapted), args),
        "forward, not merged": lambda: forward(model, adapted, args),
    }
    if args.reference:
        runs |= theirs(args)
    runs["QLoRA step, int8 base"] = lambda: step(model, int8, args)
    rows = {name: said(name, run()) for name, run in runs.items()}
    if args.json:
        Path(args.json).write_text(json.dumps({"args": vars(args), **rows}, indent=1))


def said(name, row):
    cells = (f"{key} {value:.4g}" for key, value in row.items())
    print(f"{name:24s}", *cells, sep="  ", flush=True)
    return row


def batch(args):
    rng = np.random.default_rng(1)
    moments = rng.standard_normal((args.batch, *SHAPE[:2], 8)).astype(np.float32)
    return {"moments": moments, "label": np.arange(args.batch, dtype=np.int32)}


def step(model, params, args):
    """Measures seconds and memory of a compiled training step."""
    tx = optax.adamw(1e-4)
    state = TrainState.create(params, tx)
    trained = sum(x.size for x in jax.tree.leaves(state.params))
    run = jax.jit(make_train_step(model, Interpolant(), tx))
    key, data = jax.random.key(0), batch(args)
    compiled = run.lower(state, Latents(), data, key).compile()
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    seconds = timed(lambda: compiled(state, Latents(), data, key), args.repeats)
    return {**seconds, "GB": used / 1e9, "trained, millions": trained / 1e6}


def forward(model, params, args):
    x = jnp.asarray(batch(args)["moments"][..., :4])
    t, y = jnp.full(args.batch, 0.5), jnp.arange(args.batch)
    run = jax.jit(lambda params, *at: apply_model(model, params, *at))
    return timed(lambda: run(params, x, t, y), args.repeats)


def timed(run, repeats, wait=jax.block_until_ready):
    """Returns the median of the seconds, and half of how far they spread."""
    wait(run())
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        wait(run())
        seconds.append(time.perf_counter() - begun)
    return {
        "seconds": statistics.median(seconds),
        "spread": (max(seconds) - min(seconds)) / 2,
    }


def theirs(args):
    """What to time with PyTorch and peft, in this order."""
    import peft
    import torch

    sys.path.insert(0, args.reference)
    found = importlib.util.spec_from_file_location(
        "models", Path(args.reference) / "models.py"
    )
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    size = SIZES[args.size]
    network = module.SiT(
        depth=size["depth"], hidden_size=size["width"], num_heads=size["heads"]
    )
    x = torch.from_numpy(batch(args)["moments"][..., :4].transpose(0, 3, 1, 2).copy())
    t, y = torch.full((args.batch,), 0.5), torch.arange(args.batch)

    def steps(network):
        own = [p for p in network.parameters() if p.requires_grad]
        tx = torch.optim.AdamW(own, lr=1e-4, weight_decay=0)

        def run():
            tx.zero_grad()
            ((network(x, t, y) - x) ** 2).mean().backward()
            tx.step()

        return run

    def look(network):
        with torch.no_grad():
            return network(x, t, y)

    targets = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=targets)
    adapted = functools.cache(lambda: peft.get_peft_model(network, config))
    together = functools.cache(lambda: adapted().merge_and_unload())
    time = lambda run: timed(run, args.repeats, wait=lambda result: None)
    return {
        "torch: full step": lambda: time(steps(network.train())),
        "torch + peft: LoRA step": lambda: time(steps(adapted())),
        "torch + peft: not merged": lambda: time(lambda: look(adapted().eval())),
        "torch + peft: merged": lambda: time(lambda: look(together())),
    }


if __name__ == "__main__":
    main()
