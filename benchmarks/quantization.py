"""What int8 and 4-bit weights cost in likeness, and save in bytes and time.

python benchmarks/quantization.py --weights runs/digits --out quantization.json

Every form draws the same images from the same noise as the float32 weights, and is held
against those: states on the way, bytes of the pictures, what evaluate.py says.
Images a second are those of SiT-S/2 with random weights, all forms in turn.
"""

import argparse
import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.adapters.quantize import SKIP, quantize_params, tree_bytes
from sit_jax.config import spec
from sit_jax.convert.open import WeightsRef
from sit_jax.evaluation.digits import DigitFeatures, digit_figures
from sit_jax.evaluation.fid import Gaussian, frechet_distance
from sit_jax.experiment import build_experiment
from sit_jax.files import atomic_write
from sit_jax.models.dit import SIZES, SiT
from sit_jax.parallel.mesh import make_mesh
from sit_jax.precision import policy
from sit_jax.recipes import sit
from sit_jax.samplers.fixed_ode import FixedStepODE, heun
from sit_jax.sampling.batch_sampler import BatchSampler
from sit_jax.training.state import init_params

STEPS = 25
TIMED_STEPS, ROWS = 3, 4  # of Heun, guided: 6 evaluations of 8 rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", required=True, metavar="DIR", help="of configs/digits.py")
    add("--out", required=True, metavar="X.json")
    add("--num", type=int, default=1000, help="images; 0: times alone")
    add("--forms", default="w8,w8a8,w4g96,w4g32", metavar="A,B,...")
    add("--rounds", type=int, default=5, help="of timing")
    args = parser.parse_args()
    words = ["float32", "bfloat16", *args.forms.split(",")]
    rows = likeness(args, words) if args.num else {}
    for word, row in speed(words, args.rounds).items():
        rows.setdefault(word, {}).update(row)
    with atomic_write(args.out) as path:
        path.write_text(json.dumps({"args": vars(args), "rows": rows}, indent=1))
    print(*table(rows), sep="\n")


def likeness(args, words):
    """Measures the figures of each form on the digits."""
    opened = WeightsRef(args.weights).open()
    sampler = FixedStepODE(method=heun, steps=STEPS, trajectory_length=6)
    parts = dataclasses.replace(build_experiment(opened.config), sampler=sampler)
    mesh = make_mesh(data=-1, fsdp=1)
    params = opened.load("ema", parts, mesh)
    labels = np.arange(args.num, dtype=np.int32) % 10
    rows, reference = {}, None
    for word in words:
        form, tree = stored(parts, params, word)
        states, images = draw(form, tree, mesh, labels)
        figures = digit_figures(images, labels)
        reference = reference or (states, images)
        rows[word] = {"bytes": tree_bytes(tree)} | against(*reference, states, images)
        rows[word] |= {k: figures[k] for k in ("samples_recognised", "frechet_samples")}
    return rows


def stored(parts, params, word):
    """Returns the experiment and the params of one form."""
    if word == "float32":
        return _exact(parts), params
    if word == "bfloat16":
        model = policy.with_compute_dtype(policy.get_precision("bf16"), parts.model)
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return dataclasses.replace(parts, model=model), half
    return _exact(parts), quantize_params(params, word, SKIP)


def draw(parts, params, mesh, labels):
    """Returns states [frames, N, ...] on the way, and uint8 images [N, H, W, C]."""
    make = generator(parts, params, mesh, 250)
    drawn = [(data, stats["trajectory"]) for data, stats in make(0, labels)]
    data, ways = (
        np.concatenate(each, axis=i) for i, each in enumerate(zip(*drawn, strict=True))
    )
    return ways, np.asarray(parts.codec.decode(data))


def generator(parts, params, mesh, batch):
    word = policy.get_precision("bf16" if parts.model.dtype == "bfloat16" else "exact")
    around = lambda fn: policy.with_precision(word, fn)
    return BatchSampler(parts, params, mesh, batch, with_precision=around)


def against(states, images, ours, pictures):
    off = [relative(a, b) for a, b in zip(ours[1:], states[1:], strict=True)]
    mse = np.mean((pictures.astype(float) - images) ** 2)
    extractor = DigitFeatures()
    between = [Gaussian.of(extractor.hidden(x)) for x in (images, pictures)]
    return {
        "state_error": off,
        "psnr": float(10 * np.log10(255**2 / mse)) if mse else None,
        "bytes_equal": float(np.mean(pictures == images)),
        "frechet_to_float": frechet_distance(*between),
    }


def speed(words, rounds):
    """Measures each form when sampling ROWS images by SiT-S/2, in turn."""
    config = sit()
    config.model = spec(SiT, patch=2, **SIZES["S"])
    config.sampler = spec(FixedStepODE, method=heun, steps=TIMED_STEPS)
    config.guidance = 1.5
    parts, mesh = build_experiment(config), make_mesh(data=-1, fsdp=1)
    params = jax.jit(partial(init_params, parts.model, parts.shape))(jax.random.key(0))
    rng = np.random.default_rng(0)
    kick = lambda w: w + 0.02 * rng.standard_normal(w.shape, np.float32)
    params = jax.tree.map(kick, params)
    words = ["w4" if word.startswith("w4") else word for word in words]
    runs, times = {}, {word: [] for word in words}
    for word in dict.fromkeys(words):
        form, tree = stored(parts, params, word)
        runs[word] = generator(form, tree, mesh, ROWS)
        list(runs[word](0, np.arange(ROWS)))
    for _ in range(rounds):
        for word, make in runs.items():
            begun = time.perf_counter()
            list(make(0, np.arange(ROWS)))
            times[word].append(time.perf_counter() - begun)
    base = np.median(times["float32"])
    return {
        word: {
            "s2_images_per_second": float(ROWS / np.median(each)),
            "s2_seconds": [min(each), float(np.median(each)), max(each)],
            "s2_times_float32": float(base / np.median(each)),
            "s2_bytes": tree_bytes(stored(parts, params, word)[1]),
        }
        for word, each in times.items()
    }


def table(rows):
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    yield "| form | " + " | ".join(keys) + " |"
    for word, row in rows.items():
        row = {key: row.get(key) for key in keys}
        cells = (
            " ".join(f"{v:.3g}" for v in np.atleast_1d(x)) if x is not None else ""
            for x in row.values()
        )
        yield f"| {word} | " + " | ".join(cells) + " |"


def relative(a, b):
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def _exact(parts):
    model = dataclasses.replace(parts.model, dtype="float32")
    return dataclasses.replace(parts, model=model)


if __name__ == "__main__":
    main()
