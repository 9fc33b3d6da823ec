"""A codec of one small matrix, and the recorded VAE as diffusers writes it."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from helpers.recorded import FOLDER
from safetensors.numpy import load_file

from sit_jax.convert import tensor_files
from sit_jax.convert.diffusers import STEM
from sit_jax.convert.rules import to_flax, vae_rules
from sit_jax.models.vae import AutoencoderKL
from sit_jax.precision.policy import EXACT, Precision


class ToyCodec(struct.PyTreeNode):
    """Nothing symmetric: the mirrored image has other moments."""

    kernel: jnp.ndarray  # [48, 4]: mean and log variance of two channels
    scale: float = struct.field(pytree_node=False, default=0.5)
    precision: Precision = struct.field(pytree_node=False, default=EXACT)
    encoder_sha256: str = struct.field(pytree_node=False, default="e" * 64)

    def encode(self, images):
        """uint8 [B, H, W, 3] -> float32 [B, H/4, W/4, 4]."""
        x = images.astype(jnp.float32) / 127.5 - 1
        b, h, w, _ = x.shape
        x = x.reshape(b, h // 4, 4, w // 4, 4, 3).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(b, h // 4, w // 4, 48) @ self.kernel

    def record(self):
        """What a manifest says of it."""
        return {"encoder_sha256": self.encoder_sha256}


def toy(seed=0, **fields):
    kernel = np.random.default_rng(seed).normal(size=(48, 4)) / 4
    return ToyCodec(jnp.asarray(kernel, jnp.float32), **fields)


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
