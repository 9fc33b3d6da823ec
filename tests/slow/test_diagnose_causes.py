"""Every cause with the networks it needs: SiT, VAE, Inception, of random weights."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import ROOT, small
from safetensors.numpy import load_file, save_file
from test_evaluate_network import random_params

from sit_jax.config import spec, to_json
from sit_jax.convert.inception import InceptionWeights
from sit_jax.diagnosis import bundle, stages
from sit_jax.diagnosis.ladder import EQUAL
from sit_jax.diagnosis.report import diagnose as judge
from sit_jax.diagnosis.report import open_evidence
from sit_jax.evaluation.features import inception_extractor
from sit_jax.evaluation.fid import Gaussian
from sit_jax.experiment import build_experiment
from sit_jax.manifest import environment
from sit_jax.models import inception
from sit_jax.models.codec import Latents
from sit_jax.parallel.mesh import make_mesh
from sit_jax.samplers.fixed_ode import FixedStepODE, euler, heun
from sit_jax.sampling.job import SamplingJob
from sit_jax.sampling.run import build_context

VAE = ROOT / "tests" / "golden" / "vae"
LISTED = np.repeat(np.arange(4, dtype=np.int32), 2)


def config(method=heun, channels=3, word="exact", vae="exact"):
    c = small.config(shape=(4, 4, 4), guidance=4.0, guidance_channels=channels)
    c.sampler = spec(FixedStepODE, method=method, steps=4)
    c.codec = spec(Latents)
    c.precision.model, c.precision.vae = word, vae
    return c


def half_pixel(images, shape=(inception.SIDE, inception.SIDE)):
    """What most JAX ports do: corners are not aligned."""
    size = (len(images), *shape, images.shape[-1])
    return jax.image.resize(images.astype(jnp.float32), size, "bilinear")


@pytest.fixture(scope="module")
def tensors():
    params, rng = (
        small.random_params(build_experiment(config()), 0),
        np.random.default_rng(1),
    )
    kicked = lambda w: w + 0.1 * rng.standard_normal(w.shape, np.float32)
    return {"params": params, "ema": jax.tree.map(kicked, params)}


@pytest.fixture(scope="module")
def made(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    weights = InceptionWeights(random_params(), None, "0" * 64, False)
    mesh = make_mesh(data=-1, fsdp=1, devices=jax.devices()[:1])

    def make(name, given=None, held=None, settings=None, resize=None, **fields):
        c, patch = config(**settings or {}), pytest.MonkeyPatch()
        job = {"weights": "w", "labels": LISTED, "vae": str(VAE), **fields}
        job = SamplingJob(config=to_json(c), **job)
        held = held or tensors
        load = lambda item, parts, mesh: held[item]
        opened = types.SimpleNamespace(load=load, meta={})
        context = build_context(job, opened)
        manifest = {"job": job.to_json(), **context.record, **environment()}
        manifest = json.loads(json.dumps(manifest))
        with patch.context() as patched:
            if resize:
                patched.setattr(inception, "resize_tf1", half_pixel)
            extractor = inception_extractor(weights, mesh, 4)
            if resize == "declared":
                extractor.pipeline = extractor.pipeline | {"resize": "half-pixel"}
            inputs = stages.make_inputs(context, 4, given)
            found = stages.collect(
                context, manifest, folder / name, inputs, steps=6, extractor=extractor
            )
        bundle.write(found)
        return folder / name

    return make


@pytest.fixture(scope="module")
def good(made):
    return made("good")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Another decoder, and the noise of another layout."""
    folder = tmp_path_factory.mktemp("files")
    vae = folder / "vae"
    vae.mkdir()
    (vae / "config.json").write_bytes((VAE / "config.json").read_bytes())
    state = load_file(VAE / "diffusion_pytorch_model.safetensors")
    for name in state:
        if name.startswith("decoder."):
            state[name] = (state[name] * 1.1).astype(np.float32)
    save_file(state, vae / "diffusion_pytorch_model.safetensors")
    noise = np.random.default_rng(0).standard_normal((8, 4, 4, 4), np.float32)
    np.save(folder / "noise.npy", noise.transpose(0, 3, 1, 2))
    return folder


def corrupted(tensors):
    flat = flatten_dict(tensors["ema"], sep="/")
    kernel = np.array(flat["blocks/mlp/fc1/kernel"])
    kernel[1, 3] *= 1.5
    return {
        **tensors,
        "ema": unflatten_dict(flat | {"blocks/mlp/fc1/kernel": kernel}, "/"),
    }


# what is done to B: the cause, and the first stage that exact ones would not differ at
CASES = {
    "bf16 model": ("precision", "time embedding|patches"),
    "bf16 VAE": ("precision of the VAE", "decoded"),
    "TF32 model": ("precision", "time embedding"),
    "MDT's rounding": ("rounding", "uint8"),
    "half-pixel resize": ("resize", "resized"),
    "half-pixel resize, undeclared": ("resize", "resized"),
    "another decoder": ("decoder", "decoded"),
    "all-channel guidance": ("guided channels", "guidance"),
    "random labels": ("labels", None),
    "a corrupted tensor": ("weights", "block 1"),
    "noise of another layout": ("noise", None),
    "Euler for Heun": ("solver", "6 steps"),
    "raw weights for EMA": ("weights", "time embedding"),
}


def change(name, tensors, files):
    return {
        "bf16 model": dict(settings=dict(word="bf16")),
        "bf16 VAE": dict(settings=dict(vae="bf16")),
        "TF32 model": dict(emulate="gpu-tf32"),
        "MDT's rounding": dict(rounding="mdt"),
        "half-pixel resize": dict(resize="declared"),
        "half-pixel resize, undeclared": dict(resize="silent"),
        "another decoder": dict(vae=str(files / "vae")),
        "all-channel guidance": dict(settings=dict(channels=4)),
        "random labels": dict(labels=np.int32([3, 0, 2, 4, 2, 1, 0, 3])),
        "a corrupted tensor": dict(held=corrupted(tensors)),
        "noise of another layout": dict(noise=str(files / "noise.npy")),
        "Euler for Heun": dict(settings=dict(method=euler)),
        "raw weights for EMA": dict(item="params"),
    }[name]


@pytest.mark.parametrize("name", CASES)
def test_the_right_cause_is_named_first(name, good, made, tensors, files):
    cause, stage = CASES[name]
    other = made(name, given=bundle.read(good), **change(name, tensors, files))
    found = judge(open_evidence(good), open_evidence(other))
    first = found["causes"][0]
    assert first["name"] == cause and not first["contradicted"], found["causes"]
    inexact = [rung["stage"] for rung in found["ladder"] if rung["inexact"]]
    assert (inexact[0] in stage.split("|")) if stage else not inexact, inexact


def test_the_last_rungs_are_features_and_figures(good, made):
    reference = Gaussian(np.zeros(2048), np.eye(2048))
    sides = open_evidence(good), open_evidence(made("again"))
    found = judge(*sides, reference=reference)
    names = [rung["stage"] for rung in found["ladder"]]
    assert names[-8:] == [
        *("decoded", "uint8", "resized", "features", "spatial features"),
        *("mean of the features", "covariance of the features", "FID of the few"),
    ]
    assert found["first"] == EQUAL and not any(r["relative"] for r in found["ladder"])
    assert sides[0].bundle.record["evaluation"]["resize"] == inception.RESIZE
    kept = dataclasses.asdict(sides[0].bundle)["stages"]
    assert kept["resized"].shape == (4, 299, 299, 3)
    assert kept["features"].shape == (4, 2048)
