"""A small run to diagnose, and one cause at a time put between two of its bundles."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from helpers import small

from sit_jax.config import spec
from sit_jax.experiment import build_experiment
from sit_jax.samplers.fixed_ode import FixedStepODE, euler, heun

STEPS, IMAGES = 6, 4
LISTED = np.repeat(np.arange(4, dtype=np.int32), 3)


def config(method=heun, channels=3, word="exact"):
    c = small.config(shape=(4, 4, 4), guidance=4.0, guidance_channels=channels)
    c.sampler = spec(FixedStepODE, method=method, steps=4)
    c.precision.model = word
    return c


@pytest.fixture(scope="module")
def tensors():
    params, rng = (
        small.random_params(build_experiment(config()), 0),
        np.random.default_rng(1),
    )
    kicked = lambda w: w + 0.1 * rng.standard_normal(w.shape, np.float32)
    return {"params": params, "ema": jax.tree.map(kicked, params)}


def corrupted(tensors):
    flat = flatten_dict(tensors["ema"], sep="/")
    kernel = np.array(flat["blocks/mlp/fc1/kernel"])
    kernel[1, 3] *= 1.5
    flat["blocks/mlp/fc1/kernel"] = kernel
    return {**tensors, "ema": unflatten_dict(flat, sep="/")}


def other_start():
    return np.random.default_rng(3).permutation(np.resize(np.arange(5), 12))


# name: what is done to B, the cause, the first stage beyond exact, in the verdict
CASES = {
    "bf16": (
        dict(settings=dict(word="bf16")),
        ("precision", "time embedding|patches", "24 and 8 bits (exact and bf16)"),
    ),
    "tf32": (
        dict(emulate="gpu-tf32"),
        ("precision", "time embedding", "24 and 11 bits"),
    ),
    "tpu": (
        dict(emulate="tpu-default"),
        ("precision", "time embedding", "24 and 8 bits"),
    ),
    "rounding": (dict(rounding="mdt"), ("rounding", "uint8", "dit and mdt")),
    "channels": (
        dict(settings=dict(channels=4)),
        ("guided channels", "guidance", "3 and 4"),
    ),
    "labels": (
        dict(labels=np.int32(other_start())),
        ("labels", None, "listed and balanced; 9 of 12 differ"),
    ),
    "tensor": (
        dict(weights=corrupted),
        ("weights", "block 1", "tensors differ: blocks/1/mlp/fc1/kernel"),
    ),
    "noise": (dict(seed=7), ("noise", None, "job.seed: 0 and 7")),
    "solver": (
        dict(settings=dict(method=euler)),
        ("solver", f"{STEPS} steps", "fixed_ode.heun and samplers.fixed_ode.euler"),
    ),
    "raw": (
        dict(item="params"),
        ("weights", "time embedding", "the average (EMA) against the raw weights"),
    ),
}
