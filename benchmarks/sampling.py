"""Images per second of sampling, beside the original's in the same run.

python benchmarks/sampling.py [--sizes S,B] [--batch 4] [--reference DIR]

DIR is a clone of SiT (it needs torch, timm and torchdiffeq); without it there is no
opponent. Random weights, 256 px latents, guidance 1.5, float32. The first call, which
compiles, is timed apart; the peak of resident memory is the process's.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
from absent import stand_in

from sit_jax.config import spec
from sit_jax.experiment import build_experiment
from sit_jax.models.dit import SIZES, SiT
from sit_jax.parallel.mesh import make_mesh, replicated
from sit_jax.recipes import sit
from sit_jax.samplers.adaptive_ode import AdaptiveODE
from sit_jax.samplers.fixed_ode import FixedStepODE, heun
from sit_jax.samplers.torchdiffeq import torchdiffeq_control
from sit_jax.sampling.batch_sampler import BatchSampler
from sit_jax.training.state import init_params

SAMPLERS = {
    "heun 25": lambda: spec(FixedStepODE, method=heun, steps=25),
    "dopri5": lambda: spec(AdaptiveODE, control=torchdiffeq_control),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="S,B")
    parser.add_argument("--sampler", choices=SAMPLERS, help="one instead of both")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--reference", metavar="DIR", help="a clone of SiT")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    results = []
    for size in args.sizes.split(","):
        for name in [args.sampler] if args.sampler else SAMPLERS:
            row = {"size": f"{size}/2", "sampler": name, "batch": args.batch}
            row |= ours(size, SAMPLERS[name](), args.batch, args.repeats)
            if args.reference:
                row |= theirs(args.reference, size, name, args.batch, args.repeats)
                row["ratio"] = row["images_per_second"] / row["torch_images_per_second"]
            row["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            results.append(row)
            print(said(row), flush=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))


def ours(size, sampler, batch, repeats):
    config = sit()
    config.model = spec(SiT, patch=2, **SIZES[size])
    config.guidance = 1.5
    with config.ignore_type():
        config.sampler = sampler
    parts = build_experiment(config)
    mesh = make_mesh(data=-1, fsdp=1)
    params = random_params(parts)
    begun = time.perf_counter()
    draw = BatchSampler(parts, jax.device_put(params, replicated(mesh)), mesh, batch)
    labels = np.arange(batch)
    _, stats = next(draw(0, labels))
    first = time.perf_counter() - begun
    seconds = [timed(lambda i=i: next(draw(i, labels))) for i in range(repeats)]
    return {
        "images_per_second": batch / float(np.median(seconds)),
        "first_call_seconds": first,
        "evaluations": int(stats["evaluations"]),
    }


def random_params(parts):
    """No zeros: the gates of an untrained network would make its field trivial."""
    params = init_params(parts.model, parts.shape, jax.random.key(0))
    rng = np.random.default_rng(0)
    kick = lambda w: np.asarray(w) + 0.02 * rng.standard_normal(w.shape, np.float32)
    return jax.tree.map(kick, params)


def theirs(folder, size, name, batch, repeats):
    """The original's model and sampler, with weights of the same kind."""
    import torch

    stand_in("torchvision")  # timm imports it for its data, and wants none here
    sys.path.insert(0, str(Path(folder).resolve()))
    from models import SiT_models
    from transport import Sampler, create_transport

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    model = SiT_models[f"SiT-{size}/2"](input_size=32, learn_sigma=True).eval()
    for weight in model.parameters():
        weight.add_(0.02 * torch.randn_like(weight))
    method, points = ("heun2", 26) if name == "heun 25" else ("dopri5", 2)
    run = Sampler(create_transport()).sample_ode(
        sampling_method=method, num_steps=points, atol=1e-6, rtol=1e-3
    )
    count = [0]

    def forward(x, t, **kwargs):
        count[0] += 1
        return model.forward_with_cfg(x, t, **kwargs)

    labels = torch.cat([torch.arange(batch), torch.full((batch,), 1000)])
    z = torch.randn(batch, 4, 32, 32)
    call = lambda: run(torch.cat([z, z]), forward, y=labels, cfg_scale=1.5)
    seconds = [timed(call) for _ in range(repeats)]
    return {
        "torch_images_per_second": batch / float(np.median(seconds)),
        "torch_evaluations": count[0] // repeats,
    }


def timed(call):
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def said(row):
    line = (
        f"SiT-{row['size']}, {row['sampler']}, batch {row['batch']}: "
        f"{row['images_per_second']:.4g} images/s in {row['evaluations']} evaluations, "
        f"first call {row['first_call_seconds']:.1f} s, peak {row['peak_gb']:.1f} GB"
    )
    if "ratio" in row:
        line += (
            f"; PyTorch {row['torch_images_per_second']:.4g} in "
            f"{row['torch_evaluations']}: ratio {row['ratio']:.2f}"
        )
    return line


if __name__ == "__main__":
    main()
