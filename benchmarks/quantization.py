"""What int8 and 4-bit weights cost in likeness, and save in bytes and time.

python benchmarks/quantization.py --weights runs/digits --out quantization.json

Every form draws the same images from the same noise as the float32 weights, and is held
against those: states on the way, bytes of the pictures, and what score_digits.py says.
Times are of a forward pass of SiT-S/2, random weights, beside float32 in the same run.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

import score_digits
from sit_jax import precision, sharding
from sit_jax.data.sources import Digits
from sit_jax.drafts import draft
from sit_jax.generation import Generator
from sit_jax.metrics.gaussian import Gaussian, frechet
from sit_jax.models.applied import apply
from sit_jax.models.dit import SIZES, SiT
from sit_jax.quantized import SKIP
from sit_jax.quantizing import quantized, size
from sit_jax.recipe import recipe
from sit_jax.samplers.ode import Ode, heun
from sit_jax.weights import open_weights

STEPS = 25


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
    with draft(args.out) as path:
        path.write_text(json.dumps({"args": vars(args), "rows": rows}, indent=1))
    print(*table(rows), sep="\n")


def likeness(args, words):
    """-> {word: {figure: value}} on the digits."""
    opened = open_weights(args.weights, None)
    sampler = Ode(method=heun, steps=STEPS, frames=6)
    parts = dataclasses.replace(recipe(opened.config), sampler=sampler)
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    params = opened.load("ema", parts, mesh)
    labels = np.arange(args.num, dtype=np.int32) % 10
    rows, reference = {}, None
    for word in words:
        form, tree = stored(parts, params, word)
        states, images = draw(form, tree, mesh, labels)
        figures = score_digits.score(images, labels)
        reference = reference or (states, images)
        rows[word] = {"bytes": size(tree)} | against(*reference, states, images)
        rows[word] |= {k: figures[k] for k in ("samples_recognised", "frechet_samples")}
    return rows


def stored(parts, params, word):
    """-> the recipe and the params of one form."""
    if word == "float32":
        return _exact(parts), params
    if word == "bfloat16":
        model = precision.computing(precision.chosen("bf16"), parts.model)
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return dataclasses.replace(parts, model=model), half
    return _exact(parts), quantized(params, word, SKIP)


def draw(parts, params, mesh, labels):
    """-> states [frames, N, ...] on the way, and uint8 images [N, H, W, C]."""
    word = precision.chosen("bf16" if parts.model.dtype == "bfloat16" else "exact")
    around = lambda fn: precision.applied(word, fn)
    make = Generator(parts, params, mesh, 250, around=around)
    drawn = [(data, stats["trajectory"]) for data, stats in make(0, labels)]
    data, ways = (
        np.concatenate(each, axis=i) for i, each in enumerate(zip(*drawn, strict=True))
    )
    return ways, np.asarray(parts.codec.decode(data))


def against(states, images, ours, pictures):
    off = [relative(a, b) for a, b in zip(ours[1:], states[1:], strict=True)]
    mse = np.mean((pictures.astype(float) - images) ** 2)
    classifier = score_digits._classifier(Digits(train=True))
    between = [
        Gaussian.of(score_digits._features(classifier, x)) for x in (images, pictures)
    ]
    return {
        "state_error": off,
        "psnr": float(10 * np.log10(255**2 / mse)) if mse else None,
        "bytes_equal": float(np.mean(pictures == images)),
        "frechet_to_float": frechet(*between),
    }


def speed(words, rounds, rows=8):
    """-> {word: {"ms": median, "spread": ...}} of a forward pass of SiT-S/2."""
    model = SiT(patch=2, **SIZES["S"])
    x = jax.random.normal(jax.random.key(0), (rows, 32, 32, 4))
    at = (x, jnp.full(rows, 0.5), jnp.arange(rows))
    params = jax.jit(model.init)(jax.random.key(1), *at)["params"]
    params = jax.tree.map(lambda w: w + 0.02, params)
    runs = {}
    for word in words:
        word = "w4" if word.startswith("w4") else word
        parts = dataclasses.make_dataclass("Parts", ["model"])(model)
        form, tree = stored(parts, params, word)
        run = jax.jit(lambda tree, *at, model=form.model: apply(model, tree, *at))
        runs[word] = (run.lower(tree, *at).compile(), tree)
        jax.block_until_ready(runs[word][0](tree, *at))
    times = {word: [] for word in runs}
    for _ in range(rounds):
        for word, (run, tree) in runs.items():
            begun = time.perf_counter()
            jax.block_until_ready(run(tree, *at))
            times[word].append(1e3 * (time.perf_counter() - begun))
    base = np.median(times["float32"])
    return {
        word: {
            "s2_ms": float(np.median(each)),
            "s2_spread": [min(each), max(each)],
            "s2_times_float32": float(np.median(each) / base),
            "s2_bytes": size(runs[word][1]),
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
