"""quantize.py: a checkpoint of int8 is made, read, sampled from, and refused."""

import re

import jax
import numpy as np
from helpers import small
from helpers.small import manifest

from sit_jax.adapters.quantize import SKIP, quantize_params
from sit_jax.adapters.weights import Int4Weight
from sit_jax.checkpoint import find_step, read_meta
from sit_jax.cli import port_weights, quantize
from sit_jax.convert.open import WeightsRef
from sit_jax.experiment import build_experiment
from sit_jax.parallel.mesh import make_mesh


def test_quantize_writes_a_checkpoint_that_is_read_back(weights, tmp_path, call):
    code, out, err = call(quantize, weights, tmp_path / "q", "--form", "w4g8")
    assert (code, err) == (0, ""), err
    assert re.search(r"blocks/mlp/fc1/kernel +8,192 +\d,\d+ +\d.\d+e-0[12]", out)
    opened = WeightsRef(tmp_path / "q").open()
    experiment = build_experiment(opened.config)
    params = opened.load("ema", experiment, make_mesh(data=-1, fsdp=1))
    expected = quantize_params(small.random_params(experiment, 10), "w4g8", SKIP)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert isinstance(params["blocks"]["mlp"]["fc1"]["kernel"], Int4Weight)
    assert read_meta(*find_step(tmp_path / "q"))["from"] == str(weights)
    # no torch file, and not twice
    code, _, err = call(port_weights, tmp_path / "q", tmp_path / "x.pt")
    assert code == 2 and f"what it was made from: {weights}" in err
    code, _, err = call(quantize, tmp_path / "q", tmp_path / "r")
    assert code == 2 and "is w4g8 already" in err


def test_samples_are_the_same_quantized_on_the_way_or_beforehand(
    weights, tmp_path, call, draw, run
):
    words = ("--num", 2, "--labels", "1,2", "--guidance", 1)
    direct = draw("direct", *words, "--quantize", "w8a8")
    assert manifest(tmp_path / "direct.npy")["job"]["quantize"] == "w8a8"
    stored = tmp_path / "q"
    assert call(quantize, weights, stored, "--form", "w8a8")[0] == 0
    np.testing.assert_array_equal(direct, draw("stored", *words, weights=stored))
    words += ("--out", tmp_path / "x.npy", "--quantize", "w8")
    code, _, err = run(*words, weights=stored)
    assert code == 2 and "is in another form already" in err
