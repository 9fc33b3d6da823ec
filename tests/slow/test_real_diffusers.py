"""The real diffusers on folders written here, and its own folders read here."""

import dataclasses
import json
import os

import jax
import numpy as np
import pytest
import torch
from helpers.recorded import arrays, nchw, nhwc, relative, weights

os.environ["HF_HUB_OFFLINE"] = "1"
from sit_jax.convert import diffusers as diffusers_files
from sit_jax.convert import tensor_files
from sit_jax.convert.checkpoint import open_torch_file
from sit_jax.convert.rules import DIT_RULES, to_flax
from sit_jax.convert.state_dict import StateDictSpec
from sit_jax.models import layers
from sit_jax.models.dit import DiT

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's packages
diffusers = pytest.importorskip("diffusers", reason="of requirements-slow.txt")
MODEL = DiT(depth=2, width=40, heads=4, patch=2, classes=10)
THEIRS = dataclasses.replace(MODEL, frequency_shift=1.0, norm2_epsilon=1e-5)
SHAPE = (8, 8, 4)


def run(network, golden):
    inputs = (torch.from_numpy(golden[name]) for name in ("x", "t", "y"))
    x, t, y = inputs
    with torch.no_grad():
        return network(x, timestep=t.long(), class_labels=y).sample.numpy()


@pytest.mark.parametrize("model", [MODEL, THEIRS], ids=["released", "diffusers"])
def test_diffusers_computes_what_our_dit_does(tmp_path, monkeypatch, model):
    """With torch's own frequencies on our side: its exp is not correctly rounded."""
    golden = arrays("dit_forward_a")
    state = {n: a for n, a in weights("dit_a").items() if n != "pos_embed"}
    config = diffusers_files.diffusers_config(model, SHAPE)
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / diffusers_files.WEIGHTS
    tensor_files.write(path, diffusers_files.to_diffusers_state(state))
    network = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path).eval()
    loaded = tensor_files.open_file(path).content()
    assert set(loaded) == set(network.state_dict())  # strictly all of them
    shift = model.frequency_shift
    if model is MODEL:  # what the released weights were trained as
        for block in network.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
            block.norm3.eps = 1e-6
    exponent = -np.float32(np.log(10_000)) * torch.arange(128, dtype=torch.float32)
    table = torch.exp(exponent / (128 - shift)).numpy()
    monkeypatch.setattr(layers, "timestep_frequencies", lambda half, shift: table)
    params = to_flax(DIT_RULES, state)[0]
    inputs = (nhwc(golden["x"]), golden["t"], golden["y"])
    with jax.default_matmul_precision("highest"):
        ours = nchw(jax.jit(model.apply)({"params": params}, *inputs))
    assert relative(ours, run(network, golden)) < 1e-6


def test_what_diffusers_saves_is_read(tmp_path):
    config = diffusers_files.diffusers_config(MODEL, SHAPE)
    config.pop("_class_name")
    torch.manual_seed(0)
    network = diffusers.DiTTransformer2DModel(**config)
    # each block draws embedders of its own, which no released file has
    state = network.state_dict()
    for first, others in diffusers_files._copies(MODEL.depth):
        for name in others:
            state[name].copy_(state[first])
    network.save_pretrained(tmp_path)

    opened = open_torch_file(tmp_path)
    assert opened.config.model.width == 40 and opened.config.model.heads == 4
    found = opened.file.ema
    assert set(found) == set(StateDictSpec(MODEL, SHAPE).names)
    wanted = state["transformer_blocks.1.attn1.to_v.bias"].numpy()
    np.testing.assert_array_equal(found["blocks.1.attn.qkv.bias"][80:], wanted)
