"""The recorded autoencoder's folder, and others as diffusers writes them."""

import json

import jax
import numpy as np
from recorded import FOLDER
from test_vae import recorded_params, recorded_state

from sit_jax.convert import tensor_files
from sit_jax.convert.diffusers import STEM

GOLDEN = FOLDER / "vae"
CONFIG = json.loads((GOLDEN / "config.json").read_text())
SAFE, BIN = f"{STEM}.safetensors", f"{STEM}.bin"


def same(vae):
    jax.tree.map(np.testing.assert_array_equal, dict(vae.params), recorded_params())


def folder(path, state=None, config=CONFIG, name=SAFE):
    """A folder as diffusers writes it."""
    path.mkdir(parents=True, exist_ok=True)
    tensor_files.write(path / name, state or dict(recorded_state()))
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path
