"""Judges drawn digits: python score_digits.py runs/digits/samples.npz

A classifier trained on the real training digits says how many samples show the digit
that was asked for, and its hidden layer gives the features for a Frechet distance. The
same two figures for real digits stand beside them.
"""

import numpy as np

from sit_jax.cli.main import entry_point, make_parser, parse_args
from sit_jax.data.sources import Digits
from sit_jax.errors import UserError
from sit_jax.evaluation.digit_features import DigitFeatures
from sit_jax.evaluation.metrics import Gaussian, frechet
from sit_jax.files import as_path, atomic_write, require_free, write_json
from sit_jax.sampling.array_files import ArrayFile


@entry_point
def main():
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("samples", metavar="X.npz", help="from sample.py")
    parser.add_argument("--out", metavar="X.json", help="default: score.json beside it")
    parser.add_argument("--held-out", metavar="X.npz", help="write those digits too")
    parser.add_argument("--overwrite", action="store_true")
    args, rest = parse_args(parser)
    if rest:
        raise UserError(f"{rest[0]}: this script has no config")
    out = args.out or as_path(args.samples).with_name("score.json")
    out = require_free(out, args.overwrite)
    held_out = args.held_out and require_free(args.held_out, args.overwrite)
    images, labels = _samples(args.samples)
    figures = score(images, labels)
    write_json(out, figures)
    if held_out:  # a --reference for evaluate.py and diagnose.py
        digits = Digits(train=False)
        with atomic_write(held_out) as name:
            np.savez(name, arr_0=digits.images, arr_1=digits.labels)
    print(
        f"recognised as the digit asked for: {figures['samples_recognised']:.3f} of "
        f"{len(labels)} samples, {figures['real_recognised']:.3f} of "
        f"{figures['held_out']} held-out real digits",
        f"Frechet distance to held-out digits: {figures['frechet_samples']:.2f} for "
        f"{len(labels)} samples, {figures['frechet_real']:.2f} for "
        f"{figures['real']} real training digits",
        f"written to {out}",
        sep="\n",
    )
    return 0


def score(images, labels):
    """images uint8 [N, 8, 8, 1], labels int [N] -> figures for samples and for real."""
    train, held_out = Digits(train=True), Digits(train=False)
    judge = DigitFeatures()
    target = Gaussian.of(judge.hidden(held_out.images))
    count = min(len(images), len(train))  # as many real ones, for the same bias
    chosen = np.random.default_rng(0).permutation(len(train))[:count]
    real = judge.hidden(train.images[chosen])
    drawn = judge.hidden(images)
    share = lambda images, labels: float(np.mean(judge.recognised(images) == labels))
    return {
        "samples": len(images),
        "held_out": len(held_out),
        "real": count,
        "samples_recognised": share(images, labels),
        "real_recognised": share(held_out.images, held_out.labels),
        "frechet_samples": frechet(Gaussian.of(drawn), target),
        "frechet_real": frechet(Gaussian.of(real), target),
    }


def _samples(path):
    file = ArrayFile(path)
    images, labels = file.array("arr_0"), file.array("arr_1")
    if images.shape[1:] != (8, 8, 1) or images.dtype != np.uint8:
        raise UserError(
            f"{path} holds {images.dtype} {images.shape}; digits are uint8 (N, 8, 8, 1)"
        )
    if len(images) < 2:
        raise UserError(f"{path} holds {len(images)} image; draw at least 2")
    return images, labels


if __name__ == "__main__":
    main()
