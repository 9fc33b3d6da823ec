"""The recorded autoencoder's folder, and others as diffusers writes them."""

import functools
import json

import jax
import numpy as np
from helpers.recorded import FOLDER
from safetensors.numpy import load_file

from sit_jax.convert import tensor_files
from sit_jax.convert.diffusers import STEM
from sit_jax.convert.rules import to_flax, vae_rules
from sit_jax.models.vae import AutoencoderKL

GOLDEN = FOLDER / "vae"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
TINY = AutoencoderKL(channels=(4, 8, 8, 8), groups=4)
SAFE, BIN = f"{STEM}.safetensors", f"{STEM}.bin"


@functools.cache
def recorded_state():
    return load_file(FOLDER / "vae" / "diffusion_pytorch_model.safetensors")


@functools.cache
def recorded_params():
    params, spare = to_flax(vae_rules(TINY), recorded_state())
    assert not spare
    return params


def compvis(name, levels=4):
    """A diffusers name as latent-diffusion has it, written down once more."""
    half, _, rest = name.partition(".")
    for theirs, ours in {
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
        "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
        "mid_block.attentions.0.to_": "mid.attn_1.",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
    }.items():
        rest = rest.replace(theirs, ours)
    kind, *parts = rest.split(".")
    if kind in ("down_blocks", "up_blocks"):
        level, what, number, *parts = parts
        level = level if kind == "down_blocks" else str(levels - 1 - int(level))
        kinds = {"resnets": ["block", number], "downsamplers": ["downsample"]}
        what = kinds.get(what, ["upsample"])
        rest = ".".join([kind.removesuffix("_blocks"), level, *what, *parts])
    return f"{half}.{rest}" if rest else half


def same(vae):
    jax.tree.map(np.testing.assert_array_equal, dict(vae.params), recorded_params())


def folder(path, state=None, config=CONFIG, name=SAFE):
    """A folder as diffusers writes it."""
    path.mkdir(parents=True, exist_ok=True)
    tensor_files.write(path / name, state or dict(recorded_state()))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path
