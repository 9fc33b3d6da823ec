"""Every file in configs/: loads, builds, stores, and traces a step and a sample."""

import ast
import json
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import ROOT

from sit_jax.config import from_json, leaves, load, run_name, to_json
from sit_jax.diffusion import predictions, rng
from sit_jax.diffusion.gaussian import hybrid_loss, learned_range
from sit_jax.diffusion.guidance import classifier_free_guidance
from sit_jax.diffusion.loss_weights import mdt_min_snr_loss
from sit_jax.diffusion.schedules import linear_betas
from sit_jax.errors import UserError
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.models.codec import to_uint8_mdt
from sit_jax.models.mdt import MDT as MDT1
from sit_jax.models.mdt import MDTv2
from sit_jax.training.optimizers import adan
from sit_jax.training.state import TrainState, init_params
from sit_jax.training.step import make_train_step

FOLDER = ROOT / "configs"
FILES = sorted(file.stem for file in FOLDER.glob("[!_]*.py"))
SIT_WORDS = (
    "gvp vp noise noise+velocity-weight noise+likelihood-weight score heun sde "
    "score+velocity-weight score+likelihood-weight"
).split()

# Trainable parameters with learn_sigma, as the PyTorch code counts them (without
# pos_embed); the same for SiT and DiT.
PARAMETERS = {
    "XL/2": 674_834_720,
    "XL/4": 675_000_704,
    "XL/8": 675_664_640,
    "L/2": 457_840_672,
    "L/4": 457_988_224,
    "L/8": 458_578_432,
    "B/2": 130_315_808,
    "B/4": 130_426_496,
    "B/8": 130_869_248,
    "S/2": 32_865_056,
    "S/4": 32_920_448,
    "S/8": 33_142_016,
}
# MDT's as counted in its PyTorch code, with the decoders that the files state.
MDT = {
    "mdt.py:XL/2": 699_778_144,
    "mdt.py:L/2": 477_641_312,
    "mdt.py:B/2": 141_488_528,
    "mdt.py:S/2": 35_797_208,
    "mdt.py:XL/2+v2": 742_263_904,
    "mdt.py:L/2+v2": 507_015_776,
    "mdt.py:B/2+v2": 150_931_856,
    "mdt.py:S/2+v2": 38_454_872,
}


# What else MDT's code and scripts set: run.sh, image_train.py, train_util.py, models.py
# script_util.py, image_sample.py; of version 1 on its branch.
V1 = {
    "model": {
        "mask_ratio": 0.3,
        "mask_ratio_range": 0.0,
        "decoder": 2,
        "classes": 1000,
        "patch": 2,
    },
    "optimizer": {"learning_rate": 3e-4, "b1": 0.9, "b2": 0.999, "weight_decay": 0.0},
    "process": {
        **{"steps": 1000, "schedule": linear_betas, "variance": learned_range},
        **{"objective": hybrid_loss, "prediction": predictions.noise},
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
    "model": {**V1["model"], "mask_ratio_range": 0.2, "decoder": 4},
    "optimizer": {**ADAN, "weight_decay": 0.0},
    "process": {**V1["process"], "objective": mdt_min_snr_loss},
    **{"clip": 1.0, "log_every": 500},
}
V2_S2 = {
    **V2,
    "model": {**V2["model"], "decoder": 6},
    "optimizer": {**V2["optimizer"], "learning_rate": 5e-4},
}
MDT_VALUES = {name: V2 if "v2" in name else V1 for name in MDT}
MDT_VALUES |= {"mdt.py:S/2+v2": V2_S2}

NAMES = [
    *(f"{file}.py" for file in FILES if file not in ("sit", "dit", "mdt")),
    *(f"{family}.py:{size}" for family in ("sit", "dit") for size in PARAMETERS),
    *(f"sit.py:B/2+{words}" for words in SIT_WORDS),
    *("sit.py:XL/2+512", "dit.py:XL/2+512", *MDT),
]


@cache
def parts(name):
    return build_experiment(load(f"{FOLDER}/{name}"), TRAINING)


@cache
def abstract_state(name):
    p = parts(name)
    init = lambda key: TrainState.create(
        init_params(p.model, p.shape, key), p.optimizer
    )
    return jax.eval_shape(init, jax.random.key(0))


@pytest.mark.parametrize("name", FILES)
def test_file_begins_with_a_sentence_and_states_only_a_difference(name):
    text = (FOLDER / f"{name}.py").read_text()
    first = ast.get_docstring(ast.parse(text)).split("\n\n")[0]
    assert "\n" not in first, first
    assert len(text.splitlines()) <= 40 and len(FILES) <= 16


OLD = {  # a file of version 0.1: what it is now
    "sit_b4": "sit.py:B/4",
    "dit_xl2_512": "dit.py:XL/2+512",
    "sit_b2_noise_velocity_weight": "sit.py:B/2+noise+velocity-weight",
    "sit_xl2_heun": "sit.py:XL/2+heun",
    "mdt_s2": "mdt.py:S/2",
    "mdtv2_xl2": "mdt.py:XL/2+v2",
}


@pytest.mark.parametrize("name", OLD)
def test_old_file_name_answers_with_the_variant(name):
    with pytest.raises(
        UserError, match=f"it is now --config .*{re.escape(OLD[name])}$"
    ):
        load(FOLDER / f"{name}.py")
    load(f"{FOLDER}/{OLD[name]}")


@pytest.mark.parametrize(
    "name, message",
    [
        ("sit.py:Q/2", "size 'Q/2': S, B, L or XL"),
        ("sit.py:B/3", "size 'B/3'"),
        ("dit.py:B/2+vp", "no 'vp'; there are 512"),
        ("tiny.py:B/2", "it has no variants, so no 'B/2'"),
    ],
)
def test_unknown_variant_is_refused(name, message):
    with pytest.raises(UserError, match=message):
        load(f"{FOLDER}/{name}")


def test_run_is_named_by_file_and_variant():
    assert run_name("configs/sit.py:B/2+noise") == "sit-B-2-noise"
    assert run_name("configs/digits.py") == "digits"


@pytest.mark.parametrize("name", NAMES)
def test_config_is_the_same_after_json_and_back(name):
    stored = json.dumps(to_json(load(f"{FOLDER}/{name}")))
    again = from_json(json.loads(stored))
    assert json.dumps(to_json(again)) == stored
    ours, theirs = parts(name), build_experiment(again, TRAINING)
    for field in ("model", "process", "sampler", "shape", "guidance"):
        assert getattr(ours, field) == getattr(theirs, field), field


@pytest.mark.parametrize("name", NAMES)
def test_config_has_the_published_number_of_parameters(name):
    params = abstract_state(name).params
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    size = name.partition(":")[2]
    if size in PARAMETERS or name in MDT:
        assert count == (MDT[name] if name in MDT else PARAMETERS[size])
    assert count > 1000


@pytest.mark.parametrize("name", MDT)
def test_mdt_values_are_the_published_ones(name):
    config = load(f"{FOLDER}/{name}")
    made = (MDTv2, adan) if "v2" in name else (MDT1, optax.adamw)
    assert (config.model.make, config.optimizer.make) == made
    for field, wanted in MDT_VALUES[name].items():
        found = config[field]
        if isinstance(wanted, dict):
            found = {key: found[key] for key in wanted}
        assert found == wanted, field


@pytest.mark.slow
def test_training_step_traces_for_every_kind_of_config():
    """One file for each kind: tracing takes seconds, and sizes change nothing."""
    names = one_of_each_kind(
        "optimizer.make process codec ema_decay timesteps log_quartiles"
    )
    assert len(names) >= 12
    for name in names:
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
def test_sample_traces_for_every_kind_of_config():
    names = one_of_each_kind("process sampler shape guidance guidance_channels")
    assert len(names) >= 9
    for name in names:
        p, params = parts(name), abstract_state(name).params
        start = jax.ShapeDtypeStruct((2, *p.shape), jnp.float32)
        data = jax.eval_shape(partial(sampled, p), params, start)
        assert (data.shape, data.dtype) == (start.shape, start.dtype), name


def one_of_each_kind(fields):
    """Returns names of configs of which no two have the same model and fields."""
    names = {}
    for name in reversed(NAMES):
        values = dict(leaves(to_json(load(f"{FOLDER}/{name}"))))
        wanted = ("model.make", *fields.split())
        kind = {key: v for key, v in values.items() if key.startswith(wanted)}
        names[json.dumps(kind, sort_keys=True)] = name
    return names.values()


def sampled(p, params, start):
    labels = jnp.arange(2)
    net = partial(p.model.apply, {"params": params})
    net = classifier_free_guidance(
        net, labels, p.model.classes, p.guidance, p.guidance_channels
    )
    draw = rng.step_noise(rng.image_keys(0, labels), p.shape)
    return p.sampler(net, p.process, start, draw).data
