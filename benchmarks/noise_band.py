"""Is the noise band of diagnose.py right? python benchmarks/noise_band.py [--pairs 300]

Pairs of sets of features whose laws are known: how often sets of one law are called
different at a level, what the band is beside what gaps really scatter by, and how small
a difference is found. Beside it four standard deviations of an unpaired bootstrap of 30
resamples, which was the rule before. Prints Markdown, which
docs/evidence/diagnosis.md has.
"""

import argparse
import sys
from pathlib import Path
from statistics import NormalDist

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from sit_jax.diagnosis import paired
from sit_jax.evaluation.fid import Gaussian, frechet_distance

LEVELS = (0.05, 0.01, 0.001)
CLASSES = 10
EFFECTS = (2, 3, 4, 5, 8, 12)  # true gaps, in standard deviations of a gap by seeds


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--pairs", type=int, default=300, help="of sets, for each law")
    add("--images", type=int, default=2000)
    add("--width", type=int, default=64, help="numbers in a feature")
    args = parser.parse_args()
    head = "law | true sd | noise / true | bootstrap / true | beyond 5 % | 1 % | 0.1 %"
    row(*head.split(" | "))
    row(*["---"] * 7)
    for name, law in laws(args).items():
        row(name, *rates(law, args))
    print()
    row("true gap / sd", *EFFECTS)
    row(*["---"] * (len(EFFECTS) + 1))
    for name, shares in power(laws(args)["ten classes"], args).items():
        row(name, *shares)
    print(f"\n95 % interval over pairs: {covered(laws(args), args):.1f} % covered")
    return 0


def laws(args):
    """Returns by name (draw(rng, shift) -> features [N, D], labels or None)."""
    n, d = args.images, args.width
    spread = np.arange(1, d + 1) ** -0.5
    middles = 3 * np.random.default_rng(0).standard_normal((CLASSES, d)) * spread
    gaussian = lambda mean: (
        lambda rng, shift: (rng.standard_normal((n, d)) + mean) * spread + shift
    )
    heavy = lambda rng, shift: (rng.standard_t(5, (n, d)) + 0.3) * spread + shift
    labels = np.arange(n) % CLASSES

    def mixture(rng, shift):
        return rng.standard_normal((n, d)) * spread + middles[labels] + shift

    return {
        "Gaussian": (gaussian(0.3), None),
        "Gaussian, equal to the reference": (gaussian(0.0), None),
        "heavy tails (t of 5)": (heavy, None),
        "ten classes": (mixture, labels),
        "ten classes, labels not known": (mixture, None),
    }


def reference(args):
    """Of a real set there is always some distance, and more directions than one."""
    spread = np.arange(1, args.width + 1) ** -0.5
    return Gaussian(np.zeros(args.width), np.diag(spread**2))


def rates(law, args, boots=20):
    """Returns the columns of a law's row."""
    draw, labels = law
    there, rng = reference(args), np.random.default_rng(1)
    gaps, noises, strapped = [], [], []
    for i in range(args.pairs):
        a, b = draw(rng, 0.0), draw(rng, 0.0)
        found = compared(a, b, there, labels)
        gaps.append(found.gap)
        noises.append(found.noise)
        if i < boots:
            strapped.append(bootstrap(a, b, there, rng))
    true = np.sqrt(np.mean(np.square(gaps)))  # its mean is zero
    over = [
        np.mean(np.abs(gaps) > NormalDist().inv_cdf(1 - level / 2) * np.array(noises))
        for level in LEVELS
    ]
    old = f"{np.mean(strapped) / true:.2f}"
    new = f"{np.mean(noises) / true:.2f}"
    return f"{true:.3g}", new, old, *(f"{100 * each:.2g} %" for each in over)


def power(law, args):
    """Returns by rule the share of pairs found beyond noise, for each true gap."""
    draw, labels = law
    there, rng = reference(args), np.random.default_rng(2)
    count = max(args.pairs // 3, 10)
    base = Gaussian.of(np.concatenate([draw(rng, 0.0) for _ in range(20)]))
    noise = compared(draw(rng, 0.0), draw(rng, 0.0), there, labels).noise
    shares = {"this band": [], "4 bootstrap sd": []}
    for effect in EFFECTS:
        shift = shift_for(base, there, effect * noise)
        found = [0, 0]
        for _ in range(count):
            a, b = draw(rng, shift), draw(rng, 0.0)
            gap = compared(a, b, there, labels)
            found[0] += not gap.within_noise
            found[1] += abs(gap.gap) > 4 * bootstrap(a, b, there, rng)
        for name, each in zip(shares, found, strict=True):
            shares[name].append(f"{100 * each / count:.0f} %")
    return shares


def covered(laws, args):
    """Percent of intervals that hold the mean gap of pairs of a small difference."""
    (draw, labels), there = laws["ten classes"], reference(args)
    rng, gaps, intervals = np.random.default_rng(3), [], []
    for _ in range(args.pairs):
        a = draw(rng, 0.0)
        b = 1.01 * a + 0.02 * rng.standard_normal(a.shape)
        found = paired.compare(a, b, there, True, labels=(labels, labels))
        gaps.append(found.gap)
        intervals.append(found.interval)
    low, high = np.transpose(intervals)
    return 100 * np.mean((low <= np.mean(gaps)) & (np.mean(gaps) <= high))


def shift_for(base, there, gap):
    """The shift of all features that moves the distance of a law by so much."""
    slope, square = 2 * (base.mean - there.mean).sum(), len(base.mean)
    return (-slope + np.sqrt(slope**2 + 4 * square * gap)) / (2 * square)


def compared(a, b, there, labels):
    both = None if labels is None else (labels, labels)
    return paired.compare(a, b, there, are_pairs=False, labels=both)


def bootstrap(a, b, there, rng, resamples=30):
    """Returns the standard deviation of the gap over sets drawn anew from each set."""
    far = lambda x: frechet_distance(
        Gaussian.of(x[rng.integers(len(x), size=len(x))]), there
    )
    return np.std([far(a) - far(b) for _ in range(resamples)], ddof=1)


def row(*cells):
    print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    sys.exit(main())
