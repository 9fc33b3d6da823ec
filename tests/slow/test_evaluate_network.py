"""evaluate.py with the network itself, of random weights, in a process of its own."""

import json

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers.small import script

from sit_jax.convert.rules import to_torch
from sit_jax.evaluation.fid import Gaussian, frechet_distance
from sit_jax.models.inception import RULES, Inception, param_shapes, preprocess


def random_params():
    rng, flat = np.random.default_rng(0), {}
    for path, leaf in flatten_dict(param_shapes(), sep="/").items():
        z = rng.standard_normal(leaf.shape, np.float32)
        kernel = z * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
        kinds = {"kernel": kernel, "scale": 1 + 0.1 * z, "var": 0.6 + 0.1 * np.abs(z)}
        flat[path] = kinds.get(path.rsplit("/", 1)[1], 0.1 * z)
    return unflatten_dict(flat, sep="/")


def test_the_script_with_the_network(tmp_path):
    params = random_params()
    state = to_torch(RULES, params)
    state = {name: torch.from_numpy(array) for name, array in state.items()}
    torch.save(state, tmp_path / "w.pth")
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, bright, (count, 40, 32, 3)).astype(np.uint8)
        for count, bright in ((10, 256), (9, 200))
    ]
    for name, each in zip(("s", "r"), images, strict=True):
        np.savez(tmp_path / name, arr_0=each)
    done = script(
        *("evaluate.py", tmp_path / "s.npz", "--reference", tmp_path / "r.npz"),
        *("--inception", tmp_path / "w.pth", "--force", "--batch-size", 8),
        *("--save-features", tmp_path / "f.npz", "--metrics", "fid"),
    )
    assert done.returncode == 0, done.stderr
    network = lambda p, x: Inception().apply({"params": p}, preprocess(x))
    ours, theirs = (jax.jit(network)(params, each) for each in images)
    with np.load(tmp_path / "f.npz") as kept:
        for name, want in ours.items():
            np.testing.assert_allclose(kept[name], want, rtol=1e-4, atol=1e-3)
    text = (tmp_path / "s.npz.evaluation.json").read_text()
    far = frechet_distance(
        *(Gaussian.of(np.asarray(x["pool"])) for x in (ours, theirs))
    )
    assert abs(json.loads(text)["figures"]["fid"] / far - 1) < 1e-4
