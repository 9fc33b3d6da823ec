"""LoRA as a run: its start, its checkpoints and their base, sampling, refusals."""

import json
from functools import partial

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import adapters, small
from helpers.adapters import begun, config, drawn
from helpers.networks import quick_jit

from sit_jax import checkpoint
from sit_jax.adapters.apply import apply_model
from sit_jax.adapters.lora import LoRA
from sit_jax.adapters.quantize import SKIP, quantize_params
from sit_jax.adapters.weights import (
    LABEL_TABLE,
    ExtraRows,
    LoRAWeight,
    join,
    materialize,
)
from sit_jax.cli import port_weights, sample
from sit_jax.cli.quantize import save_quantized
from sit_jax.config import to_json
from sit_jax.convert.adapters import apply_adapters
from sit_jax.convert.open import (
    CheckpointWeights,
    WeightsRef,
    adapter_shapes,
    load_adapted,
)
from sit_jax.errors import UserError
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.parallel.mesh import make_mesh
from sit_jax.trainer.loop import train

base = adapters.base
called = adapters.called
run = adapters.run


def test_the_start_is_pefts(base):
    """Kaiming-uniform with a = sqrt(5) is U(-1, 1) / sqrt(in)."""
    _, state, _ = begun(base, rank=64, rank_stabilized=True)
    node = state.params["blocks"]["mlp"]["fc2"]["kernel"]
    down = np.asarray(node.lora_a)
    assert down.shape == (2, 64, 64) and not np.any(node.lora_b)
    assert 0.97 / 8 < down.max() <= 1 / 8 and -1 / 8 <= down.min() < -0.97 / 8
    assert down.std() == pytest.approx(1 / 8 / 3**0.5, rel=0.03)
    assert not np.array_equal(down[0], down[1])
    assert node.scale == 3.0 / 8
    assert LoRA(rank=4, alpha=6.0).scale == 1.5


def test_new_classes_begin_as_the_null_label_and_tables_by_their_other_side(base):
    parts, state, _ = begun(base, new_classes=2, targets=LABEL_TABLE)
    node = join(state.params, state.frozen_params)["cond"]["label"]["embedding"]
    assert isinstance(node, LoRAWeight) and isinstance(node.base, ExtraRows)
    assert not np.any(node.lora_a) and np.std(node.lora_b) > 0.5
    table = np.asarray(node.read())
    assert table.shape == (8, 16)
    np.testing.assert_array_equal(table[5:], np.broadcast_to(table[7], (3, 16)))
    assert parts.model.classes == 7


@pytest.mark.parametrize("dora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_step_0_gives_what_the_base_gives(base, dora):
    parts, state, _ = begun(base, dora=dora, targets="blocks/.*")
    stored = join(state.params, state.frozen_params)
    plain = jax.tree.map(
        np.asarray, small.random_params(build_experiment(small.config(), TRAINING), 10)
    )
    x = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype(np.float32)
    at = (x, np.array([0.2, 0.7], np.float32), np.array([1, 5]))
    run = quick_jit(partial(apply_model, parts.model))
    ours, theirs = run(stored, *at), run(plain, *at)
    if dora:  # lengths over lengths that were summed in another program
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    else:
        np.testing.assert_array_equal(ours, theirs)


def test_a_checkpoint_holds_adapters_and_says_what_they_are_of(run, base):
    directory, step = checkpoint.find_step(run)
    meta = checkpoint.read_meta(directory, step)
    assert meta["base"]["path"] == str(base) and meta["base"]["step"] == 8
    assert len(meta["base"]["sha256"]) == 64
    parts = build_experiment(config(), TRAINING)
    shapes = adapter_shapes(parts)
    held = checkpoint.load(directory, step, params=placed(shapes))["params"]
    sizes = {name: x.shape for name, x in checkpoint.leaves_by_name(held).items()}
    assert sizes == {
        "blocks/attn/qkv/kernel/down": (2, 16, 2),
        "blocks/attn/qkv/kernel/up": (2, 2, 48),
        "blocks/mlp/fc2/kernel/down": (2, 64, 2),
        "blocks/mlp/fc2/kernel/up": (2, 2, 16),
    }
    assert all(np.any(x) for x in jax.tree.leaves(held))


def placed(shapes):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return jax.tree.map(put, shapes)


def test_a_run_begins_over_its_base_and_goes_on_without_being_told(base, tmp_path):
    train(config(), tmp_path, WeightsRef(str(base)))
    train(config(steps=3), tmp_path)  # the meta tell the base
    assert checkpoint.steps(tmp_path / "checkpoints") == [2, 3]
    records = [
        checkpoint.read_meta(tmp_path / "checkpoints", n)["base"] for n in (2, 3)
    ]
    assert records[0] == records[1] and records[0]["path"] == str(base)
    before, after = (checkpoint.items(tmp_path / "checkpoints", n) for n in (2, 3))
    assert before == after >= {"params", "ema", "opt_state"}
    whole = tmp_path / "whole"
    train(config(steps=3), whole, WeightsRef(str(base)))
    assert small.losses(whole) == small.losses(tmp_path)


def test_another_base_is_refused_by_its_hash(run, tmp_path):
    parts = build_experiment(small.config(), TRAINING)
    other = small.random_params(parts, 3)
    meta = {"config": json.loads((run / "config.json").read_text())}
    del meta["config"]["adapter"]
    small.save(tmp_path / "other", 8, {**meta, "step": 8}, params=other, ema=other)
    directory, step = checkpoint.find_step(run)
    told = f"{tmp_path}/other/8 is not the base of these adapters"
    with pytest.raises(UserError, match=told):
        load_adapted(
            build_experiment(config()),
            make_mesh(),
            CheckpointWeights(directory, step),
            "ema",
            tmp_path / "other",
        )


@pytest.mark.parametrize("form", [pytest.param("w8", marks=pytest.mark.slow), "w8a8"])
def test_a_quantized_checkpoint_can_be_the_base(base, tmp_path, form):
    parts = build_experiment(small.config(), TRAINING)
    params = quantize_params(small.random_params(parts, 10), form, SKIP)
    meta = {"config": to_json(small.config()), "step": 8}
    save_quantized(tmp_path / "q", 8, params, meta, form=form, skip=SKIP)
    if form == "w8a8":
        with pytest.raises(UserError, match="no gradient goes: take w8"):
            begun(tmp_path / "q")
        return
    _, state, record = begun(tmp_path / "q")
    node = state.frozen_params["blocks"]["attn"]["qkv"]["kernel"]
    assert node.base.codes.dtype == "int8" and len(record["sha256"]) == 64


@pytest.mark.slow  # compiles a training step
def test_the_whole_network_can_be_trained_from_merged_adapters(run, tmp_path):
    c = small.config(steps=1, save_every=1, preview=0)
    train(c, tmp_path, WeightsRef(str(run)))
    held = checkpoint.items(tmp_path / "checkpoints", 1)
    assert {"params", "ema", "opt_state"} <= held


def test_adapters_are_sampled_alone_and_on_their_base(called, run, base, tmp_path):
    draw = partial(drawn, called, tmp_path)
    alone = draw("alone", "--weights", run)
    half = ("--lora", f"{run}:0.75", "--lora", f"{run}:0.25")
    both = draw("both", "--weights", base, *half)
    np.testing.assert_allclose(both, alone, atol=1e-5)
    record = json.loads((tmp_path / "both.npy.manifest.json").read_text())
    assert [each["weight"] for each in record["lora"]] == [0.75, 0.25]
    none = draw("none", "--weights", base, "--lora", f"{run}:0")
    assert np.abs(none - alone).max() > 1e-4


@pytest.mark.slow  # the same at more weights, and again from the record
def test_a_weight_of_nothing_is_the_base_and_a_record_draws_again(
    called, run, base, tmp_path
):
    draw = partial(drawn, called, tmp_path)
    on = draw("on", "--weights", base, "--lora", f"{run}")
    np.testing.assert_array_equal(on, draw("alone", "--weights", run))
    none = draw("none", "--weights", base, "--lora", f"{run}:0")
    np.testing.assert_array_equal(none, draw("plain", "--weights", base))
    half = draw("half", "--weights", base, "--lora", f"{run}:0.5")
    assert np.abs(half - on).max() > 1e-5 < np.abs(half - none).max()
    again = draw("again", "--from-manifest", tmp_path / "half.npy.manifest.json")
    np.testing.assert_array_equal(again, half)


@pytest.mark.slow
def test_merging_writes_a_network_that_draws_the_same(called, run, tmp_path):
    words = (run, tmp_path / "merged", "--adapter", "merged")
    assert called(port_weights, *words)[0] == 0
    draw = partial(drawn, called, tmp_path)
    merged = draw("merged", "--weights", tmp_path / "merged")
    np.testing.assert_array_equal(merged, draw("run", "--weights", run))


def test_adapters_where_they_do_not_belong(called, run, base, tmp_path):
    parts = build_experiment(small.config(), TRAINING)
    params = small.random_params(parts, 10)
    wider = small.random_params(build_experiment(wide(), TRAINING), 10)
    told = [
        ((params, [str(run)], "0" * 64), "belongs to other weights"),
        ((wider, [str(run)], None), r"another network: its blocks/attn/qkv/kernel is"),
        ((params, [f"{run}:much"], None), "PATH, or PATH:WEIGHT"),
        ((params, [str(base)], None), "no adapters: use --weights"),
        ((params, ["nowhere"], None), "nowhere; it holds no step"),
    ]
    for (weights, words, sha), line in told:
        with pytest.raises(UserError, match=line) as raised:
            apply_adapters(weights, words, parts.model, sha)
        assert "\n" not in str(raised.value)
    code, _, err = called(port_weights, run, tmp_path / "x.pt")
    assert code == 2 and "say what they shall become" in err
    words = ("--weights", base, "--lora", base, "--out", tmp_path / "x.npy")
    code, _, err = called(sample, *words)
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "x.npy").exists()


def wide():
    c = small.config()
    c.model.width = 32
    return c


def test_reading_a_run_gives_the_base_where_nothing_was_adapted(run, base):
    directory, step = checkpoint.find_step(run)
    weights = CheckpointWeights(directory, step)
    params, _ = load_adapted(build_experiment(config()), make_mesh(), weights, "ema")
    ours = flatten_dict(materialize(params), sep="/")
    theirs = flatten_dict(
        small.random_params(build_experiment(small.config(), TRAINING), 10), sep="/"
    )
    changed = {name for name in theirs if not np.array_equal(ours[name], theirs[name])}
    assert changed == {"blocks/attn/qkv/kernel", "blocks/mlp/fc2/kernel"}
