"""Draws samples: python sample.py --weights runs/digits --labels 0,1,2 --out x.png

The network comes from the weights; sampler and guidance from there too, or from a
config or the flags. Image i follows from the seed, its label and i alone.
"""

import importlib
import time
from functools import partial

import jax
import numpy as np

from sit_jax import command, noise, outputs, sharding
from sit_jax import config as configs
from sit_jax.errors import UserError
from sit_jax.generation import Generator
from sit_jax.manifest import environment, weights_hash
from sit_jax.preview import rows
from sit_jax.recipe import check_seed, recipe
from sit_jax.samplers.names import SAMPLERS, chosen
from sit_jax.weights import open_weights
from sit_jax.workdir import write_json

NETWORK = ("model", "process", "shape")
COMPUTING = ("model.remat", "model.unroll", "model.dtype")  # how, and not what


def main():
    parser = command.parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", required=True, metavar="PATH", help="workdir, checkpoint, .pt ...")
    add("--config", metavar="FILE", help="another sampler and guidance; same network")
    add("--labels", metavar="A,B,...", help="classes; default: random ones")
    add("--num", type=int, metavar="N", help="images; default: one for each label")
    add("--seed", type=int, default=0)
    add("--out", required=True, metavar="X", help="x.png | x.npy | x.npz | folder/")
    add("--noise", metavar="FILE.npy", help="start from this noise, [N, H, W, C]")
    add("--guidance", type=float, metavar="SCALE", help="1: none")
    add("--sampler", metavar="NAME", help=", ".join(SAMPLERS))
    add("--steps", type=int, metavar="N")
    add("--batch-size", type=int, default=64, metavar="N")
    add("--no-ema", action="store_true", help="the weights themselves, not their mean")
    add("--family", choices=("sit", "dit"), help="of a bare .pt or .safetensors")
    add("--heads", type=int, help="of a bare file whose width is not a published one")
    add("--overwrite", action="store_true")
    args, overrides = command.parse(parser)
    return sample(args, overrides)


def sample(args, overrides):
    """-> exit code, after args.out and its manifest are written."""
    check_seed("--seed", args.seed)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size}: at least 1")
    out = outputs.check(args.out, args.overwrite)
    weights = open_weights(args.weights, partial(_torch_file, args))
    config = _config(weights.config, args, overrides)
    parts = recipe(config)
    mesh = sharding.make_mesh(data=-1, fsdp=1)
    start = _given_noise(args.noise, parts.shape)
    labels, columns = _labels(args, parts.model.classes, start)
    if outputs.wants_pictures(out):
        one = jax.ShapeDtypeStruct((1, *parts.shape), np.float32)
        jax.eval_shape(parts.codec.decode, one)  # refuses now, not after sampling
    item = "params" if args.no_ema else "ema"
    params = weights.load(item, parts, mesh)
    draw = Generator(parts, params, mesh, min(args.batch_size, len(labels)))
    data, stats, seconds = _drawn(draw, args.seed, labels, start)
    images = (
        np.asarray(parts.codec.decode(data)) if outputs.wants_pictures(out) else None
    )
    outputs.write(out, data, images, labels, columns)
    record = {
        "config": configs.to_json(config),
        "weights": {"path": str(args.weights), "item": item},
        "weights_sha256": weights_hash(params),
        "seed": args.seed,
        "labels": labels.tolist(),
        "noise": args.noise,
        "batch_size": draw.batch_size,
        "stats": {name: values.tolist() for name, values in stats.items()},
        "images_per_second": len(labels) / seconds,
        **environment(),
    }
    write_json(outputs.manifest_path(out), record)
    print(_summary(stats, len(labels), seconds, draw.compile_seconds), out, sep="\n")
    return 0


def _config(config, args, overrides):
    """The weights' config, as a file, the flags and --config.x=y change it."""
    if args.config is not None:
        given = configs.load(args.config)
        pick = lambda c: configs.to_json({name: c[name] for name in NETWORK})
        unlike = configs.difference(pick(config), pick(given))
        unlike = [each for each in unlike if each[0] not in COMPUTING]
        if unlike:
            listed = "; ".join(f"{n} is {a}, not {b}" for n, a, b in unlike)
            raise UserError(f"{args.weights} holds another network: {listed}")
        for name in ("sampler", "guidance", "guidance_channels", "codec"):
            config[name] = given[name]
    chosen(config, args.sampler, args.steps)
    if args.guidance is not None:
        config.guidance = args.guidance
    configs.override(config, overrides)
    return config


def _torch_file(args, path):
    from sit_jax.exchange import open_torch

    return open_torch(path, _published, args.family, args.heads)


def _published(family):
    """The config of the published run that a torch file's network is put into."""
    return importlib.import_module(f"configs.{family}_xl2").get_config()


def _given_noise(path, shape):
    if path is None:
        return None
    try:
        start = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"--noise {path} is not a .npy file of numbers") from error
    if not isinstance(start, np.ndarray):
        raise UserError(f"--noise {path} is not a .npy file of numbers")
    if start.shape[1:] != shape or start.dtype.kind != "f":
        raise UserError(
            f"--noise {path} is {start.dtype} {start.shape}; it must be float32 "
            f"(N, {', '.join(map(str, shape))})"
        )
    if not np.isfinite(start).all():
        raise UserError(f"--noise {path} has values that are not finite")
    return start.astype(np.float32)


def _labels(args, classes, start):
    """-> labels int [N] and the number of columns that a sheet of them has."""
    number = args.num
    if number is None and start is not None:
        number = len(start)
    if start is not None and number != len(start):
        raise UserError(f"--num {number}, but {args.noise} has {len(start)} images")
    if number is not None and number < 1:
        raise UserError(f"--num {number}: at least 1")
    if args.labels is None:
        keys = noise.image_keys(args.seed, np.arange(1 if number is None else number))
        labels = np.asarray(noise.labels(keys, classes))
        return labels, rows(len(labels) + 1, len(labels))[0]
    listed = [_label(word, classes) for word in args.labels.split(",")]
    number = len(listed) if number is None else number
    if number % len(listed):
        raise UserError(
            f"--num {number} is not divisible by the {len(listed)} labels; "
            f"each label gets a row of as many images"
        )
    each = number // len(listed)
    columns = each if each > 1 else rows(len(listed) + 1, len(listed))[0]
    return np.repeat(np.asarray(listed, np.int32), each), columns


def _label(word, classes):
    if not word.strip().isdecimal() or int(word) >= classes:
        raise UserError(
            f"--labels: {word!r} is not a class; there are 0..{classes - 1}"
        )
    return int(word)


def _drawn(draw, seed, labels, start):
    from tqdm import tqdm

    begun, data, stats = time.perf_counter(), [], []
    with tqdm(total=len(labels), unit="image", disable=None) as bar:
        for part, numbers in draw(seed, labels, start):
            data.append(part)
            stats.append(numbers)
            bar.update(len(part))
    seconds = time.perf_counter() - begun
    stats = {name: np.stack([s[name] for s in stats]) for name in stats[0]}
    return np.concatenate(data), stats, seconds


def _summary(stats, count, seconds, compile_seconds):
    low, high = stats["evaluations"].min(), stats["evaluations"].max()
    evaluations = f"{low}" if low == high else f"{low} to {high}"
    line = (
        f"{count} images, {evaluations} network evaluations each, "
        f"{count / seconds:.1f} images/s (compiled in {compile_seconds:.1f} s)"
    )
    if not stats.get("finished", np.True_).all():
        line += (
            "\nWARNING: the solver gave up before the end, so images are unfinished; "
            "take a larger --config.sampler.rtol, or --sampler heun --steps 50"
        )
    return line


if __name__ == "__main__":
    command.script(main)
