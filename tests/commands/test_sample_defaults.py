"""What sample.py takes where a flag is not given: the preset's, or the weights' own."""

import json

import pytest
from helpers import small

from sit_jax.cli import sample
from sit_jax.config import spec
from sit_jax.diffusion.guidance import PowerCosine
from sit_jax.models.codec import Pixels, to_uint8_mdt
from sit_jax.recipes import mdt
from sit_jax.samplers.fixed_ode import FixedStepODE, euler
from sit_jax.sampling import presets
from sit_jax.sampling.presets import Preset


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A network whose run was guided and rounded as MDT's."""
    guidance = spec(PowerCosine, scale=3.0, power=4.0, steps=1)
    config = small.config(codec=spec(Pixels, rounding=to_uint8_mdt))
    with config.ignore_type():
        config.guidance, config.sampler = (
            guidance,
            spec(FixedStepODE, method=euler, steps=2),
        )
    return small.checkpoint(tmp_path_factory.mktemp("weights"), config)


@pytest.fixture
def job(monkeypatch, capsys, weights, tmp_path):
    """-> the job of the manifest that a command leaves."""

    def run(*arguments):
        out = tmp_path / "x.npz"
        how = ("--weights", weights, "--out", out, "--overwrite", *arguments)
        code, _, err = small.called(sample.main, monkeypatch, capsys, *how)
        assert code == 0, err
        record = json.loads(out.with_name("x.npz.manifest.json").read_text())
        assert record["codec"]["rounding"] == record["job"]["rounding"]
        return record["job"]

    return run


def test_bytes_are_rounded_as_the_config_of_the_weights_says(job):
    assert job("--labels", "1")["rounding"] == "mdt"
    assert job("--labels", "1", "--rounding", "dit")["rounding"] == "dit"
    assert mdt().codec.rounding is to_uint8_mdt


def test_a_seed_of_0_is_not_the_presets(job, monkeypatch):
    made = Preset(
        *("any", "a figure", "nobody"),
        sampler=spec(FixedStepODE, method=euler, steps=1),
        guidance=1.0,
        **dict(vae=None, labels="1", num=None, seed=4),
    )
    monkeypatch.setitem(presets.PRESETS, "own", lambda: made)
    assert job("--preset", "own")["seed"] == 4
    assert job("--preset", "own", "--seed", "0")["seed"] == 0


def test_guidance_is_the_scale_of_the_weights_schedule(job):
    """A constant one is another: for MDT that is not what --cfg-scale says there."""
    found = [job("--labels", "1", *more)["config"]["guidance"] for more in ASKED]
    assert found[0]["scale"] == 2.0 and found[0]["power"] == 4.0
    assert found[1] == 1.0
    assert found[2]["make"]["name"].endswith("Interval") and found[2]["scale"] == 2.0


ASKED = (
    ("--guidance", 2),
    ("--guidance", 1),
    ("--guidance", 2, "--guidance-interval", "0,1"),
)
