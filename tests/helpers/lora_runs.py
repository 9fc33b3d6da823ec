"""Runs of train.py with random adapters over the network of small.py."""

import json

import jax
import numpy as np
from helpers import small

from sit_jax.adapters.lora import LoRA
from sit_jax.config import spec, to_json
from sit_jax.convert.open import adapter_shapes, load_base
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.parallel.mesh import make_mesh
from sit_jax.trainer.resume import init_lora

FIELDS = dict(targets="blocks/(attn/qkv|mlp/fc2)/kernel", rank=2, alpha=3.0)


def config(adapter=None, **fields):
    c = small.config(**{"steps": 2, "save_every": 2, "preview": 0, **fields})
    c.adapter = spec(LoRA, **{**FIELDS, **(adapter or {})})
    return c


def grown(adapter):
    """The config of a run whose model counts its new classes too."""
    c = config(adapter)
    c.model.classes += c.adapter.new_classes
    return c


def begun(base, **adapter):
    """-> the recipe, the state and the base's record of a run that begins."""
    parts = build_experiment(grown(adapter), TRAINING)
    state, _, about = init_lora(parts, make_mesh(), 0, "nowhere", str(base))
    return parts, state, about["base"]


def saved(workdir, base, seed=0, **adapter):
    """-> workdir, with a checkpoint of step 2 whose adapters are random."""
    parts = build_experiment(grown(adapter))
    _, record = load_base(parts, make_mesh(), str(base))
    rng = np.random.default_rng(seed)
    draw = lambda x: 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    items = {n: jax.tree.map(draw, adapter_shapes(parts)) for n in ("params", "ema")}
    told = to_json(grown(adapter))
    meta = {"config": told, "base": record, "step": 2}
    small.save(workdir / "checkpoints", 2, meta, **items)
    (workdir / "config.json").write_text(json.dumps(told))
    return workdir
