"""A bundle by torch beside one by JAX, of the same job and of one tensor spoiled."""

import json
import sys

import numpy as np
import pytest
import small
from conftest import ROOT
from networks import quick_jit

import diagnose
from sit_jax import ladder, stages
from sit_jax.config import to_json
from sit_jax.job import Job

PLAIN = ROOT / "tests" / "plain_torch"


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in ("activations", "_latents"):
        quick = quick_jit(getattr(stages, name).__wrapped__, static_argnums=0)
        monkeypatch.setattr(stages, name, quick)
    import torch_bundle

    mains = {"diagnose": diagnose.main, "torch": torch_bundle.main}
    return lambda which, *words: small.called(mains[which], monkeypatch, capsys, *words)


def judged(run, out, one, other):
    code, _, err = run("diagnose", one, other, "--out", out)
    assert code == 0, err
    return json.loads((out / "report.json").read_text())


def test_torch_beside_jax(tmp_path, run):
    c = small.config(shape=(4, 4, 4), guidance=3.0)
    weights = small.checkpoint(tmp_path / "w", c)
    labels = np.arange(5, dtype=np.int32)
    manifest = tmp_path / "m.json"
    manifest.write_text(
        json.dumps({"job": Job(str(weights), to_json(c), labels).to_json()})
    )
    few = ("--from-manifest", manifest, "--images", 3, "--steps", 4)
    ours, theirs, odd = (tmp_path / name for name in ("jax", "torch", "odd"))
    code, _, err = run("diagnose", "--collect", ours, *few)
    assert code == 0, err
    flags = ("--reference", PLAIN, "--inputs", ours, *few)
    code, out, err = run("torch", "--collect", theirs, *flags)
    assert code == 0 and "TF32 off; mantissa bits of a dot 24" in out, err
    found = judged(run, tmp_path / "equal", ours, theirs)
    assert found["first"] == ladder.EQUAL and found["weights"]["differ"] == []
    assert found["verdict"] == "Nothing differs that is known to move FID."
    names = [rung["stage"] for rung in found["ladder"]]
    wanted = ["block 1", "final layer", "guidance", "one Euler step", "4 steps"]
    assert names[-7:] == [*wanted, "decoded", "uint8"]
    assert found["solver"][1]["fixed grid"] == found["solver"][0]["fixed grid"]

    params = small.random_params(small.recipe(c), 10)
    kernel = np.array(params["blocks"]["mlp"]["fc1"]["kernel"])
    kernel[1, 3] *= 1.5
    params["blocks"]["mlp"]["fc1"]["kernel"] = kernel
    meta = {"config": to_json(c), "step": 8}
    small.save(tmp_path / "spoiled", 8, meta, params=params, ema=params)
    flags = (*flags, "--weights", tmp_path / "spoiled", "--force")
    assert run("torch", "--collect", odd, *flags)[0] == 0
    found = judged(run, tmp_path / "odd report", ours, odd)
    assert found["first"].startswith("The discrepancy starts at block 1, which differs")
    assert found["causes"][0]["name"] == "weights"
    assert found["weights"]["differ"] == ["blocks/1/mlp/fc1/kernel"]


def test_what_the_original_cannot_do_is_refused(tmp_path, run):
    c = small.config(shape=(4, 4, 4), guidance=3.0, guidance_channels=4)
    weights = small.checkpoint(tmp_path / "w", c)
    job = Job(str(weights), to_json(c), np.arange(5, dtype=np.int32))
    manifest, out = tmp_path / "m.json", tmp_path / "out"
    manifest.write_text(json.dumps({"job": job.to_json()}))
    flags = ("--reference", PLAIN, "--from-manifest", manifest, "--collect", out)
    code, _, err = run("torch", *flags)
    assert code == 2 and "the originals guide 3 channels, the manifest 4" in err
    assert not out.exists()
