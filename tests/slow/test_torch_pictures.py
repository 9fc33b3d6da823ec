"""From noise to FID on both sides: diffusers' VAE and torch-fidelity's Inception.

Needs pip install --no-deps torch-fidelity for the features; all weights are random.
"""

import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from helpers import ROOT, small
from test_evaluate_network import random_params

from sit_jax.cli import diagnose
from sit_jax.config import spec, to_json
from sit_jax.convert.rules import to_torch
from sit_jax.diagnosis import ladder
from sit_jax.models.codec import Latents
from sit_jax.models.inception import RULES
from sit_jax.sampling.job import SamplingJob

PLAIN = ROOT / "tests" / "plain_torch"
VAE = ROOT / "tests" / "golden" / "vae"
DEEP = ("resized", "features", "spatial features")
LAST = ("mean of the features", "covariance of the features", "FID of the few")


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    import torch_bundle

    mains = {"diagnose": diagnose.main, "torch": torch_bundle.main}
    return lambda which, *words: small.called(mains[which], monkeypatch, capsys, *words)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    state = to_torch(RULES, random_params())
    path = tmp_path_factory.mktemp("inception") / "w.pth"
    torch.save({name: torch.from_numpy(array) for name, array in state.items()}, path)
    return path


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torch_beside_jax_from_noise_to_fid(tmp_path, run, inception):
    missing = [n for n in ("diffusers", "torch_fidelity") if find_spec(n) is None]
    if missing:  # importing the latter whole takes torchvision
        pytest.skip(f"no {missing}")
    c = small.config(shape=(8, 8, 4), guidance=3.0)
    c.codec = spec(Latents)
    weights = small.checkpoint(tmp_path / "w", c)
    labels = np.arange(8, dtype=np.int32) % 5
    job = SamplingJob(str(weights), to_json(c), labels, vae=str(VAE))
    manifest = tmp_path / "m.json"
    manifest.write_text(json.dumps({"job": job.to_json()}))
    few = ("--from-manifest", manifest, "--images", 3, "--steps", 4)
    few = (*few, "--inception", inception)
    ours, theirs = tmp_path / "jax", tmp_path / "torch"
    code, _, err = run("diagnose", "--collect", ours, *few)
    assert code == 0, err
    flags = ("--reference", PLAIN, "--inputs", ours, *few)
    code, _, err = run("torch", "--collect", theirs, *flags)
    assert code == 0, err
    rng = np.random.default_rng(0)
    pool = rng.standard_normal((30, 2048)).astype(np.float32)
    np.savez(tmp_path / "ref", pool=pool)
    reference = ("--reference", tmp_path / "ref.npz", "--out", tmp_path / "report")
    code, _, err = run("diagnose", ours, theirs, *reference)
    assert code == 0, err
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    names = [rung["stage"] for rung in found["ladder"]]
    assert names[-9:] == ["4 steps", "decoded", "uint8", *DEEP, *LAST]
    rungs = {rung["stage"]: rung for rung in found["ladder"]}
    # two programs of one float32 decoder; bytes may fall to either side of a half
    assert rungs["decoded"]["relative"] < 1e-5
    assert rungs["uint8"]["relative"] < ladder.PIXELS and rungs["uint8"]["peak"] <= 1
    assert found["first"] == ladder.EQUAL
    assert found["verdict"] == "Nothing differs that is known to move FID."
