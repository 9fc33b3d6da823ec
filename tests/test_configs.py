"""Every file in configs/: loads, builds, stores, and traces a step and a sample."""

import ast
import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from sit_jax.config import from_json, load, to_json
from sit_jax.diffusion import predictions, rng
from sit_jax.diffusion.gaussian import hybrid_loss, learned_range
from sit_jax.diffusion.guidance import classifier_free_guidance
from sit_jax.diffusion.loss_weights import mdt_min_snr_loss
from sit_jax.diffusion.schedules import linear_betas
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.models.codec import to_uint8_mdt
from sit_jax.models.mdt import MDT as MDT1
from sit_jax.models.mdt import MDTv2
from sit_jax.training.optimizers import adan
from sit_jax.training.state import init_state
from sit_jax.training.step import make_train_step

FILES = sorted((Path(__file__).parents[1] / "configs").glob("[!_]*.py"))
NAMES = [file.stem for file in FILES]
FOLDER = FILES[0].parent

# Trainable parameters with learn_sigma, as the PyTorch code counts them (without
# pos_embed); the same for SiT and DiT.
PARAMETERS = {
    "xl2": 674_834_720,
    "xl4": 675_000_704,
    "xl8": 675_664_640,
    "l2": 457_840_672,
    "l4": 457_988_224,
    "l8": 458_578_432,
    "b2": 130_315_808,
    "b4": 130_426_496,
    "b8": 130_869_248,
    "s2": 32_865_056,
    "s4": 32_920_448,
    "s8": 33_142_016,
}
# MDT's as counted in its PyTorch code, with the decoders that the files state.
MDT = {
    "mdt_xl2": 699_778_144,
    "mdt_l2": 477_641_312,
    "mdt_b2": 141_488_528,
    "mdt_s2": 35_797_208,
    "mdtv2_xl2": 742_263_904,
    "mdtv2_l2": 507_015_776,
    "mdtv2_b2": 150_931_856,
    "mdtv2_s2": 38_454_872,
}


# What else MDT's code and scripts set: run.sh, image_train.py, train_util.py, models.py
# script_util.py, image_sample.py; of version 1 on its branch.
V1 = {
    "model": {"hide": 0.3, "spread": 0.0, "decoder": 2, "classes": 1000, "patch": 2},
    "optimizer": {"learning_rate": 3e-4, "b1": 0.9, "b2": 0.999, "weight_decay": 0.0},
    "process": {
        **{"steps": 1000, "schedule": linear_betas, "variance": learned_range},
        **{"objective": hybrid_loss, "predicts": predictions.noise},
    },
    "codec": {"scale": 0.18215, "rounding": to_uint8_mdt},
    "guidance": {"scale": 3.8, "power": 4.0, "steps": 1000},
    "sampler": {"steps": 250, "clip": False},
    **{"batch_size": 256, "ema_decay": 0.9999, "label_drop": 0.1, "clip": None},
    **{"timesteps": None, "accumulate": 1, "guidance_channels": 3},
    **{"log_quartiles": True, "log_every": 10, "save_every": 10_000},
}
ADAN = {"learning_rate": 3e-4, "b1": 0.98, "b2": 0.92, "b3": 0.99, "eps": 1e-8}
V2 = {
    **V1,
    "model": {**V1["model"], "spread": 0.2, "decoder": 4},
    "optimizer": {**ADAN, "weight_decay": 0.0},
    "process": {**V1["process"], "objective": mdt_min_snr_loss},
    **{"clip": 1.0, "log_every": 500},
}
V2_S2 = {
    **V2,
    "model": {**V2["model"], "decoder": 6},
    "optimizer": {**V2["optimizer"], "learning_rate": 5e-4},
}
MDT_VALUES = dict.fromkeys([name for name in MDT if "v2_" in name], V2)
MDT_VALUES |= dict.fromkeys([name for name in MDT if "v2_" not in name], V1)
MDT_VALUES |= {"mdtv2_s2": V2_S2}


@cache
def parts(name):
    return build_experiment(load(FOLDER / f"{name}.py"), TRAINING)


@cache
def abstract_state(name):
    p = parts(name)
    init = partial(init_state, p.model, p.optimizer, p.shape)
    return jax.eval_shape(init, jax.random.key(0))


def test_the_published_sizes_are_all_there():
    wanted = {f"{family}_{size}" for family in ("sit", "dit") for size in PARAMETERS}
    wanted |= {*MDT, "mdt_digits", "sit_xl2_512", "dit_xl2_512", "digits", "tiny"}
    assert wanted <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_with_a_sentence_and_states_only_a_difference(name):
    text = (FOLDER / f"{name}.py").read_text()
    first = ast.get_docstring(ast.parse(text)).split("\n\n")[0]
    assert first.endswith(".") and "\n" not in first, first
    assert len(text.splitlines()) <= (60 if name == "sit_xl2" else 40)


@pytest.mark.parametrize("name", NAMES)
def test_json_and_back_is_the_same_config(name):
    stored = json.dumps(to_json(load(FOLDER / f"{name}.py")))
    again = from_json(json.loads(stored))
    assert json.dumps(to_json(again)) == stored
    ours, theirs = parts(name), build_experiment(again, TRAINING)
    for field in ("model", "process", "sampler", "shape", "guidance"):
        assert getattr(ours, field) == getattr(theirs, field), field


@pytest.mark.parametrize("name", NAMES)
def test_it_has_the_published_number_of_parameters(name):
    params = abstract_state(name).params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    size = name.split("_")[1] if "_" in name else None
    if size in PARAMETERS and not name.endswith("512"):
        assert count == MDT.get(name, PARAMETERS[size])
    assert count > 1000


@pytest.mark.parametrize("name", MDT)
def test_mdts_values_are_the_published_ones(name):
    config = load(FOLDER / f"{name}.py")
    made = {"mdt": (MDT1, optax.adamw), "mdtv2": (MDTv2, adan)}[name.split("_")[0]]
    assert (config.model.make, config.optimizer.make) == made
    for field, wanted in MDT_VALUES[name].items():
        found = config[field]
        if isinstance(wanted, dict):
            found = {key: found[key] for key in wanted}
        assert found == wanted, field


@pytest.mark.slow
def test_a_training_step_traces_for_every_way_of_training():
    """One file for each of them: tracing takes seconds, and sizes change nothing."""
    fields = ("process", "codec", "ema_decay", "timesteps", "log_quartiles")
    ways = {}
    for name in reversed(NAMES):
        config = to_json(load(FOLDER / f"{name}.py"))
        kinds = [config["model"]["make"], config["optimizer"]["make"]]
        ways[json.dumps([kinds, *(config.get(field) for field in fields)])] = name
    assert len(ways) >= 12
    for name in ways.values():
        p, state = parts(name), abstract_state(name)
        step = make_train_step(p.model, p.process, p.optimizer)
        batch = {
            "latent": jax.ShapeDtypeStruct((8, *p.shape), jnp.float32),
            "label": jax.ShapeDtypeStruct((8,), jnp.int32),
        }
        new, metrics = jax.eval_shape(step, state, p.codec, batch, jax.random.key(0))
        same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
        assert jax.tree.all(jax.tree.map(same, new, state)), name
        assert metrics["loss"].shape == (), name


@pytest.mark.slow
def test_a_sample_traces_for_every_way_of_sampling():
    """One file for each of them: neither the size nor the loss's weight enters."""
    ways = {}
    for name in reversed(NAMES):
        config = to_json(load(FOLDER / f"{name}.py"))
        config["process"].pop("weight", None)
        fields = ("process", "sampler", "shape", "guidance", "guidance_channels")
        way = json.dumps([config["model"]["make"], *(config[f] for f in fields)])
        ways[way] = name
    assert len(ways) >= 9
    for name in ways.values():
        p, params = parts(name), abstract_state(name).params
        start = jax.ShapeDtypeStruct((2, *p.shape), jnp.float32)
        data, stats = jax.eval_shape(partial(sampled, p), params, start)
        assert (data.shape, data.dtype) == (start.shape, start.dtype), name
        assert stats["evaluations"].shape == (), name


def sampled(p, params, start):
    labels = jnp.arange(2)
    net = partial(p.model.apply, {"params": params})
    net = classifier_free_guidance(
        net, labels, p.model.classes, p.guidance, p.guidance_channels
    )
    draw = rng.step_noise(rng.image_keys(0, labels), p.shape)
    return p.sampler(draw, p.process, net, start)
