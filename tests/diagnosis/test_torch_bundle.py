"""A bundle by torch beside one by JAX, of the same job and of one tensor spoiled."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, small
from helpers.networks import quick_jit

from sit_jax.cli import diagnose
from sit_jax.config import to_json
from sit_jax.convert import parity
from sit_jax.diagnosis import ladder, stages
from sit_jax.diffusion.gaussian import GaussianDiffusion, hybrid_loss
from sit_jax.diffusion.guidance import PowerCosine
from sit_jax.diffusion.loss_weights import mdt_min_snr_loss
from sit_jax.errors import UserError
from sit_jax.models.dit import DiT
from sit_jax.models.mdt import MDTv2
from sit_jax.sampling.job import SamplingJob

PLAIN = ROOT / "tests" / "plain_torch"


@pytest.fixture
def run(monkeypatch, capsys):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in ("compute_activations", "compute_latents"):
        quick = quick_jit(getattr(stages, name).__wrapped__, static_argnums=0)
        monkeypatch.setattr(stages, name, quick)
    import torch_bundle

    mains = {"diagnose": diagnose.main, "torch": torch_bundle.main}
    return lambda which, *words: small.called(mains[which], monkeypatch, capsys, *words)


def judged(run, out, one, other):
    code, _, err = run("diagnose", one, other, "--out", out)
    assert code == 0, err
    return json.loads((out / "report.json").read_text())


def write_manifest(folder, config):
    """Saves random weights and a manifest of five images, and returns its path."""
    weights = small.checkpoint(folder / "w", config)
    job = SamplingJob(str(weights), to_json(config), np.arange(5, dtype=np.int32))
    (folder / "m.json").write_text(json.dumps({"job": job.to_json()}))
    return folder / "m.json"


def test_torch_beside_jax(tmp_path, run):
    c = small.config(shape=(4, 4, 4), guidance=3.0)
    manifest = write_manifest(tmp_path, c)
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

    params = small.random_params(small.build_experiment(c), 10)
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


def test_torch_bundle_refuses_what_the_original_lacks(tmp_path, run):
    c = small.config(shape=(4, 4, 4), guidance=3.0, guidance_channels=4)
    manifest, out = write_manifest(tmp_path, c), tmp_path / "out"
    flags = ("--reference", PLAIN, "--from-manifest", manifest, "--collect", out)
    code, _, err = run("torch", *flags)
    assert code == 2 and "the originals guide 3 channels, the manifest 4" in err
    assert not out.exists()


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])


class Clone:
    """As MDT's network is asked; remembers what for."""

    def forward_with_cfg(self, x, t, labels, **strength):
        self.asked = labels.tolist(), strength
        return x


RISING = PowerCosine(scale=3.8, power=4.0, steps=1000)
STRENGTHS = {  # guidance: what MDT's forward_with_cfg is told
    RISING: {"cfg_scale": 3.8, "scale_pow": 4.0, "diffusion_steps": 1000},
    2.5: {"cfg_scale": 2.5, "scale_pow": 0.0},  # whose rise is over at once
}


@pytest.mark.parametrize("guidance", STRENGTHS)
def test_mdt_is_guided_as_its_script_does(guidance, benchmarks):
    import torch
    import torch_stages

    parts = SimpleNamespace(guidance=guidance, model=MDTv2(classes=5))
    clone, y = Clone(), torch.tensor([1, 2])
    net, both, doubled = torch_stages.guided(parts, clone, y)
    net(both(torch.zeros(2, 1)), both(torch.zeros(2)))
    assert doubled and clone.asked == ([1, 2, 5, 5], STRENGTHS[guidance])
    t = np.array([999.0, 500.0, 0.0], np.float32)
    power = STRENGTHS[guidance]["scale_pow"]
    rise = (1 - np.cos((1 - t / 1000) ** power * np.pi)) / 2
    scale = STRENGTHS[guidance]["cfg_scale"]
    want = guidance(t) if callable(guidance) else np.full(3, guidance)
    np.testing.assert_allclose((scale - 1) * rise + 1, want, rtol=1e-5)


def test_only_mdt_has_rising_guidance(benchmarks):
    import torch_stages

    for objective in (hybrid_loss, mdt_min_snr_loss):  # which a bundle does not see
        process = GaussianDiffusion(objective=objective)
        parts = SimpleNamespace(guidance=RISING, process=process, guidance_channels=3)
        context = SimpleNamespace(experiment=parts, guiding_model=None)
        parts.model = MDTv2()
        torch_stages.check(context)
        parts.model = DiT()
        with pytest.raises(UserError, match="or MDT's rise"):
            torch_stages.check(context)


def test_mdts_models_are_found_in_their_folder(tmp_path):
    (tmp_path / "masked_diffusion").mkdir()
    code = "class MDTv2:\n    def __init__(self, **told):\n        raise KeyError(told)"
    (tmp_path / "masked_diffusion" / "models.py").write_text(code)
    module = parity.import_original(tmp_path)
    model = MDTv2(decoder=4, mask_ratio=0.3)
    with pytest.raises(KeyError) as told:
        parity.build_original(module, model, (32, 32, 4), {})
    told = told.value.args[0]
    assert (told["decode_layer"], told["mask_ratio"], told["depth"]) == (4, 0.3, 28)
    with pytest.raises(UserError, match="has no DiT, which the weights are of"):
        parity.build_original(module, DiT(), (32, 32, 4), {})
