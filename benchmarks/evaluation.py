"""Times evaluation: python benchmarks/evaluation.py [PART ...]

inception  images/s beside torch-fidelity's extractor on the same CPU, same weights
algebra    the Frechet distance of 2048 features beside scipy's sqrtm
manifold   precision and recall of 10,000 against 50,000 features of 2048
complete   evaluate.py on 50,000 images of 256 pixels, with a stand-in for the network

Each part runs in a process of its own, so that peak memory is its own. torch-fidelity
is only compared with: pip install --no-deps --target DIR torch-fidelity, and
--torch-fidelity DIR.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from sit_jax.convert.inception import InceptionWeights
from sit_jax.evaluation.features import FeatureExtractor, inception_extractor
from sit_jax.evaluation.fid import Gaussian, frechet_distance
from sit_jax.evaluation.metrics import precision_recall
from sit_jax.models.inception import CLASSES, POOL, SPATIAL, param_shapes
from sit_jax.parallel import hardware
from sit_jax.parallel.mesh import make_mesh

BATCH, ROUNDS = 16, 3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    parser.add_argument("--torch-fidelity", metavar="DIR")
    parser.add_argument("--images", type=int, default=50_000, help="of complete")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    parts = args.parts or ["inception", "algebra", "manifold"]
    if args.here:
        PARTS[parts[0]](args)
        memory = (hardware.peak_memory() or 0) / 2**30
        print(f"  peak memory {memory:.2f} GiB, load {os.getloadavg()[0]:.1f}")
        return 0
    flags = ["--images", str(args.images)]
    if args.torch_fidelity:
        flags += ["--torch-fidelity", args.torch_fidelity]
    for part in parts:
        print(f"{part}:", flush=True)
        subprocess.run([sys.executable, __file__, part, "--here", *flags], check=True)
    return 0


def inception(args):
    weights = random_weights()
    run = inception_extractor(weights, make_mesh(data=-1, fsdp=1), BATCH)
    images = np.random.default_rng(0).integers(0, 256, (BATCH, 256, 256, 3), np.uint8)
    ours = lambda: next(run([images]))["pool"]
    sides = {"ours": ours}
    if args.torch_fidelity:
        sides["torch-fidelity"] = torch_fidelity(args.torch_fidelity, weights, images)
    first = {name: side() for name, side in sides.items()}  # compiles, warms up
    seconds = alternating(sides)
    for name, took in seconds.items():
        print(
            f"  {name}: {BATCH / took:.2f} images/s, batches of {BATCH} at 256 pixels"
        )
    if args.torch_fidelity:
        theirs = first["torch-fidelity"]
        error = np.linalg.norm(first["ours"] - theirs) / np.linalg.norm(theirs)
        ratio = seconds["torch-fidelity"] / seconds["ours"]
        print(f"  ratio {ratio:.2f}, relative difference of the features {error:.1e}")


def algebra(args):
    import scipy.linalg

    a, b = (spectrum(seed) for seed in (0, 1))

    def theirs():
        root = scipy.linalg.sqrtm(a.cov @ b.cov)
        gap = a.mean - b.mean
        cross = 2 * np.trace(root).real
        return gap @ gap + np.trace(a.cov) + np.trace(b.cov) - cross

    sides = {"ours": lambda: frechet_distance(a, b), "scipy's sqrtm": theirs}
    values = {name: side() for name, side in sides.items()}
    seconds = alternating(sides)
    for name, took in seconds.items():
        print(f"  {name}: {took:.2f} s, {values[name]:.10g}")
    ratio = seconds["scipy's sqrtm"] / seconds["ours"]
    print(f"  ratio {ratio:.2f}; a set against itself: {frechet_distance(a, a):.1e}")
    few = Gaussian.of(np.random.default_rng(0).standard_normal((1000, POOL)))
    print(f"  1000 images against themselves: {frechet_distance(few, few):.1e}")


def manifold(args):
    draw = np.random.default_rng(0).standard_normal
    samples = draw((50_000, POOL), np.float32)
    reference = draw((10_000, POOL), np.float32)
    begun, cpu = time.perf_counter(), time.process_time()
    found = precision_recall(samples, reference)
    took, cpu = time.perf_counter() - begun, time.process_time() - cpu
    products = 50_000 * (50_000 / 2 + 10_000) + 10_000**2 / 2
    flops = 2 * POOL * products / took
    print(f"  {took:.0f} s, {flops / 1e9:.0f} GFLOP/s; precision, recall {found}")
    rate = flops * took / cpu / 1e9  # tells also on a machine that others use
    print(f"  {cpu:.0f} s of a core, {rate:.0f} GFLOP/s each")


def complete(args):
    """All of evaluate.py but the network, whose place pixels take."""
    from sit_jax.cli import evaluate

    def network(params, images):
        flat = images.reshape(len(images), POOL, -1).astype("float32").mean(-1)
        pool = flat * params["scale"]
        return {"pool": pool, "spatial": pool[:, :SPATIAL], "logits": pool[:, :CLASSES]}

    def get_extractor(name, weights, batch_size):
        mesh, params = make_mesh(data=-1, fsdp=1), {"scale": np.float32(1 / 64)}
        return FeatureExtractor(network, params, mesh, batch_size, {})

    evaluate.get_extractor = get_extractor
    with tempfile.TemporaryDirectory() as folder:
        sides = Path(folder, "samples.npz"), Path(folder, "reference.npz")
        for path, count in zip(sides, (args.images, args.images // 5), strict=True):
            write_images(path, count)
        sys.argv = [
            "evaluate.py",
            str(sides[0]),
            "--reference",
            str(sides[1]),
            "--force",
        ]
        begun = time.perf_counter()
        try:
            evaluate.main()
        except SystemExit as end:
            if end.code:
                raise
        print(f"  {args.images} images: {time.perf_counter() - begun:.0f} s")


def alternating(sides):
    """Measures the least seconds of each call, by turns, so that both meet the same."""
    least = dict.fromkeys(sides, np.inf)
    for _ in range(ROUNDS):
        for name, side in sides.items():
            begun = time.perf_counter()
            side()
            least[name] = min(least[name], time.perf_counter() - begun)
    return least


def random_weights():
    """Of the size that keeps activations where they are."""
    from flax.traverse_util import flatten_dict, unflatten_dict

    rng, flat = np.random.default_rng(0), {}
    for path, leaf in flatten_dict(param_shapes(), sep="/").items():
        z = rng.standard_normal(leaf.shape, np.float32)
        kernel = z * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
        kinds = {"kernel": kernel, "scale": 1 + 0.1 * z, "var": 0.6 + 0.1 * np.abs(z)}
        flat[path] = kinds.get(path.rsplit("/", 1)[1], 0.1 * z)
    return InceptionWeights(unflatten_dict(flat, sep="/"), None, "random", False)


def torch_fidelity(folder, weights, images):
    """Returns a call of the extractor."""
    from torch_judge import TorchJudge

    judge = TorchJudge(weights, folder=folder)
    return lambda: judge(images)


def spectrum(seed):
    """A Gaussian of 2048 features whose variances fall off as Inception's do."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((POOL, POOL)))[0]
    variances = 5 * np.arange(1, POOL + 1) ** -(1 + 0.1 * seed)
    return Gaussian(0.1 * rng.standard_normal(POOL), (turn * variances) @ turn.T)


def write_images(path, count, block=500):
    """Noise of 8 x 8 pixels enlarged to 256, deflated: little on disk."""
    rng = np.random.default_rng(count)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("arr_0.npy", "w", force_zip64=True) as entry:
            header = {"descr": "|u1", "fortran_order": False}
            header["shape"] = (count, 256, 256, 3)
            np.lib.format.write_array_header_1_0(entry, header)
            for start in range(0, count, block):
                n = min(block, count - start)
                small = rng.integers(0, 256, (n, 8, 8, 3), np.uint8)
                entry.write(small.repeat(32, 1).repeat(32, 2).tobytes())


PARTS = {
    "inception": inception,
    "algebra": algebra,
    "manifold": manifold,
    "complete": complete,
}

if __name__ == "__main__":
    sys.exit(main())
