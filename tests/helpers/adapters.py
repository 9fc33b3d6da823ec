"""Networks with adapters on their weights, and runs of adapters over a base."""

import json
from functools import cache, partial

import jax
import numpy as np
import optax
import pytest
from helpers import small

from sit_jax.adapters.lora import LoRA
from sit_jax.adapters.weights import ExtraRows, LoRAWeight, replace_weights
from sit_jax.cli import sample
from sit_jax.config import spec, to_json
from sit_jax.convert.open import adapter_shapes, load_base
from sit_jax.convert.peft import LoRAPair
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.models.dit import DiT, SiT
from sit_jax.models.mdt import MDT, MDTv2
from sit_jax.parallel.mesh import make_mesh
from sit_jax.trainer.resume import init_lora
from sit_jax.training.state import init_params

SHAPE, SIZE = (4, 4, 2), dict(width=16, heads=2, classes=5)
MODELS = [SiT(depth=2, **SIZE), DiT(depth=2, **SIZE), MDT(depth=4, **SIZE)]
MODELS += [MDTv2(depth=6, **SIZE)]
EVERY = ".*"
HIGHEST = jax.lax.Precision.HIGHEST
TX = optax.adam(1e-2)


@cache
def weights(model):
    """Random ones everywhere: as drawn, most gates would be zero."""
    like = jax.eval_shape(partial(init_params, model, SHAPE), jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    return jax.tree.map(draw, like)


def adapter(path, weight, rank=3, zero=False, dora=False, **settings):
    rng = np.random.default_rng(len(path))
    draw = lambda *shape: 0.3 * rng.standard_normal(shape).astype(np.float32)
    *lead, fan_in, fan_out = weight.shape
    up = draw(*lead, rank, fan_out) * (not zero)
    magnitude = 1 + draw(*lead, fan_out) if dora and "kernel" in path else None
    down = draw(*lead, fan_in, rank)
    return LoRAWeight(weight, down, up, magnitude, **{"scale": 0.5, **settings})


def inputs(n=2):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, *SHAPE)).astype(np.float32)
    return x, np.linspace(0.2, 0.9, n, dtype=np.float32), np.arange(n) % 6


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def first(stored):
    """Its first layer."""
    return jax.tree.map(lambda leaf: leaf[0], stored)


def equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def adapted(model=MODELS[0], pattern=r"blocks/(attn/qkv|mlp/fc1)/kernel", **settings):
    tree = replace_weights(weights(model), pattern, partial(adapter, **settings))
    more = np.zeros((2, 16), np.float32)
    return replace_weights(
        tree, "cond/label/embedding", lambda _, w: ExtraRows(w, more)
    )


def pair(rank, out=6, width=4, seed=0, **more):
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    return LoRAPair(draw(rank, width), draw(out, rank), **more)


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


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small.checkpoint(tmp_path_factory.mktemp("base"), small.config())


@pytest.fixture(scope="module")
def run(tmp_path_factory, base):
    return saved(tmp_path_factory.mktemp("run") / "run", base)


@pytest.fixture
def called(monkeypatch, capsys):
    return lambda script, *words: small.called(script.main, monkeypatch, capsys, *words)


def drawn(called, tmp_path, name, *words):
    out = tmp_path / f"{name}.npy"
    asked = () if "--from-manifest" in words else ("--labels", "0,3")
    code, _, err = called(sample, *asked, "--out", out, *words)
    assert code == 0, err
    return np.load(out)
