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


def same(vae):
    jax.tree.map(np.testing.assert_array_equal, dict(vae.params), recorded_params())


def folder(path, state=None, config=CONFIG, name=SAFE):
    """A folder as diffusers writes it."""
    path.mkdir(parents=True, exist_ok=True)
    tensor_files.write(path / name, state or dict(recorded_state()))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path
