"""The whole way from A's FID to B's, by commands: every component is exchanged once.

A SiT, two VAEs and two Inceptions of small or random weights: figures mean nothing,
but that they add up and that each step is of its component.
"""

import json

import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import ROOT, small
from safetensors.numpy import load_file, save_file
from test_evaluate_network import random_params

from sit_jax.cli import diagnose, sample
from sit_jax.config import spec
from sit_jax.convert.rules import to_torch
from sit_jax.models.codec import Latents
from sit_jax.models.inception import RULES

VAE = ROOT / "tests" / "golden" / "vae"
IMAGES = 16


def config():
    c = small.config(shape=(8, 8, 4), guidance=1.5)
    c.codec = spec(Latents)
    return c


def other_vae(folder):
    """Its decoder's last layer is a tenth stronger."""
    folder.mkdir()
    (folder / "config.json").write_bytes((VAE / "config.json").read_bytes())
    state = load_file(VAE / "diffusion_pytorch_model.safetensors")
    name = "decoder.conv_out.weight"
    state[name] = (state[name] * 1.1).astype(np.float32)
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    return folder


def inception(path, change=1.0):
    flat = flatten_dict(random_params(), sep="/")
    flat = {
        n: a * np.float32(change if "Mixed_7c" in n else 1) for n, a in flat.items()
    }
    state = to_torch(RULES, unflatten_dict(flat, sep="/"))
    torch.save({name: torch.from_numpy(np.array(a)) for name, a in state.items()}, path)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    small.checkpoint(folder / "w", config())
    parts = small.build_experiment(config())
    other = {"config": small.to_json(config()), "step": 8}
    params = small.random_params(parts, 10)
    kick = np.random.default_rng(5).standard_normal
    near = small.jax.tree.map(lambda w: w + 0.02 * kick(w.shape, np.float32), params)
    small.save(folder / "w_b", 8, other, params=near, ema=near)
    other_vae(folder / "vae_b")
    inception(folder / "inception.pth")
    inception(folder / "inception_b.pth", 1.02)
    blocks = np.random.default_rng(0).integers(0, 256, (2 * IMAGES, 8, 8, 3), np.uint8)
    np.savez(folder / "ref", arr_0=blocks.repeat(8, 1).repeat(8, 2))
    return folder


def test_every_component_is_exchanged_by_command(files, monkeypatch, capsys):
    called = lambda main, *words: small.called(main, monkeypatch, capsys, *words)
    path = lambda name: files / name
    numbers = ",".join(str(i % 5) for i in range(IMAGES))
    words = ("--labels", numbers, "--batch-size", IMAGES)
    a = (path("w"), "--vae", VAE)
    b = (path("w_b"), "--vae", path("vae_b"), "--rounding", "mdt")
    sets = {"a": (*a, "--seed", 0), "b": (*b, "--seed", 1), "x": (*a, "--seed", 1)}
    for name, more in sets.items():
        flags = ("--weights", *more, *words, "--out", path(f"{name}.npy"))
        code, _, err = called(sample.main, *flags)
        assert code == 0, err
    flags = ("--reference", path("ref.npz"), "--swapped", path("x.npy"))
    flags += ("--inception", path("inception.pth"), "--batch-size", IMAGES)
    flags += ("--inception-b", path("inception_b.pth"), "--out", path("report"))
    code, out, err = called(diagnose.main, path("a.npy"), path("b.npy"), *flags)
    assert code == 0, err
    found = json.loads((path("report") / "report.json").read_text())
    names = [row["after"] for row in found["swaps"]]
    assert names == [
        *("A", "noise and labels", "latents", "decode", "rounding", "feature network")
    ]
    steps = [row["step"] for row in found["swaps"]]
    assert min(map(abs, steps[1:])) > 0
    ends = found["swaps"][0]["fid"], found["swaps"][-1]["fid"]
    assert sum(steps) == pytest.approx(ends[1] - ends[0], rel=1e-9)
    assert sum(row["share"] for row in found["swaps"]) == pytest.approx(1)
    assert "From A's figure to B's: " in out and "feature network " in out
    assert "Too few images for a noise band" in found["verdict"]
