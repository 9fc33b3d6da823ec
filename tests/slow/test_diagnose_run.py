"""diagnose.py as it is used, from sample.py's output, and on other kinds of network."""

import json
import types

import numpy as np
import pytest
from helpers import small

from sit_jax.cli import diagnose, sample
from sit_jax.config import spec, to_json
from sit_jax.diagnosis import bundle, stages
from sit_jax.diagnosis.report import diagnose as judge
from sit_jax.diagnosis.report import open_evidence
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.experiment import build_experiment
from sit_jax.manifest import environment
from sit_jax.models.codec import Latents
from sit_jax.models.dit import DiT
from sit_jax.models.mdt import MDT, MDTv2
from sit_jax.samplers.ddpm import DDPM
from sit_jax.sampling.job import SamplingJob
from sit_jax.sampling.run import build_context


def test_from_samples_to_a_report(tmp_path, monkeypatch, capsys):
    called = lambda main, *words: small.called(main, monkeypatch, capsys, *words)
    weights = small.checkpoint(tmp_path / "w", small.config())
    words = ("--weights", weights, "--labels", "3,1", "--out")
    for name, more in (("a", ()), ("b", ("--emulate", "tpu-default"))):
        code, _, err = called(sample.main, *words, tmp_path / f"{name}.npz", *more)
        assert code == 0, err
        manifest = tmp_path / f"{name}.npz.manifest.json"
        flags = ("--collect", tmp_path / f"{name}.npz.bundle", "--images", 2)
        code, _, err = called(
            diagnose.main, *flags, "--from-manifest", manifest, "--steps", 3
        )
        assert code == 0, err
    sides = (tmp_path / "a.npz", tmp_path / "b.npz")
    code, out, err = called(diagnose.main, *sides, "--out", tmp_path / "report")
    assert code == 0, err
    assert out.startswith("Likeliest cause: precision (products keep 24 and 8 bits")
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["weights"]["differ"] == [] and len(found["worst"]) == 2


CHAIN = ["one Ddim step", "3 steps"]
KINDS = {
    "DiT": (DiT, dict(depth=2), ["block 0", "block 1"]),
    "MDT": (
        MDT,
        dict(depth=3, decoder=1),
        [
            "encoder block 0",
            "encoder block 1",
            "encoder",
            "decoder block 0",
            "decoder",
        ],
    ),
    "MDTv2": (
        MDTv2,
        dict(depth=3, decoder=1),
        ["in block 0", "out block 0", "encoder", "decoder block 0", "decoder"],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_have_their_stages(kind, tmp_path):
    make, fields, blocks = KINDS[kind]
    c = small.config(shape=(4, 4, 4), guidance=2.0)
    c.model = spec(make, width=16, heads=2, patch=2, classes=5, **fields)
    c.process, c.sampler = spec(GaussianDiffusion), spec(DDPM, steps=3)
    c.codec = spec(Latents)
    params = small.random_params(build_experiment(c), 0)
    for name, emulate in (("a", None), ("b", "gpu-tf32")):
        labels = np.arange(4, dtype=np.int32)
        job = SamplingJob("w", to_json(c), labels, emulate=emulate)
        load = lambda item, parts, mesh: params
        opened = types.SimpleNamespace(load=load, meta={})
        context = build_context(job, opened)
        manifest = {"job": job.to_json(), **context.record, **environment()}
        inputs = stages.make_inputs(context, 4)
        found = stages.collect(context, manifest, tmp_path / name, inputs, steps=3)
        bundle.write(found)
    found = judge(open_evidence(tmp_path / "a"), open_evidence(tmp_path / "b"))
    names = [rung["stage"] for rung in found["ladder"]][7:]
    assert names == [*blocks, "final layer", "guidance", *CHAIN]
    assert found["causes"][0]["name"] == "precision"
    assert not any(rung["outside"] for rung in found["ladder"])
