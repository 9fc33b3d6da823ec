"""Adapters in PEFT's and diffusers' files: recorded ones, cut and joined, refused."""

import json
import shutil
from functools import cache, partial

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict
from helpers import small
from helpers.adapters import pair
from helpers.networks import quick_jit, recorded_model, recorded_params
from helpers.recorded import FOLDER, nhwc, relative

from sit_jax import checkpoint
from sit_jax.adapters.apply import apply_model
from sit_jax.adapters.lora import LoRA
from sit_jax.adapters.weights import (
    LABEL_TABLE,
    ExtraRows,
    LoRAWeight,
    is_weight_leaf,
    materialize,
    merge_adapters,
)
from sit_jax.cli import port_weights
from sit_jax.config import from_json, to_json
from sit_jax.convert import peft
from sit_jax.convert.adapters import apply_adapter, open_adapter, parse_adapter
from sit_jax.convert.open import adapter_shapes
from sit_jax.convert.rules import DIT_RULES, MDTV2_RULES
from sit_jax.experiment import build_experiment
from sit_jax.models.mdt import MDTv2
from sit_jax.training.state import init_params

RECORDED = FOLDER / "lora"


def config():
    c = small.config()
    c.shape = (8, 8, 4)
    c.model.update(depth=2, width=40, heads=4, classes=10, learn_sigma=True)
    return c


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, params = tmp_path_factory.mktemp("base"), recorded_params("sit_forward_a")
    meta = {"config": to_json(config()), "step": 0}
    small.save(folder, 0, meta, params=params, ema=params)
    return folder


@pytest.fixture
def port(monkeypatch, capsys):
    run = lambda *words: small.called(port_weights.main, monkeypatch, capsys, *words)
    return run


@cache
def network():
    return quick_jit(lambda params, *at: apply_model(model(), params, *at))


def model():
    return recorded_model("sit_forward_a")


def opened(path):
    return open_adapter(path, model(), recorded_params("sit_forward_a"))


def output(params):
    with np.load(RECORDED / "outputs.npz") as file:
        at = nhwc(file["x"]), file["t"], file["y"]
    return network()(params, *at)


def recorded(name):
    with np.load(RECORDED / "outputs.npz") as file:
        return nhwc(file[name])


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_adapters_of_peft_give_pefts_output(name):
    """Made by the real peft (tests/slow/record_peft.py); float32 in another order."""
    params = apply_adapter(recorded_params("sit_forward_a"), opened(RECORDED / name))
    assert relative(output(merge_adapters(params)), recorded(name)) < 3e-6
    assert relative(output(recorded_params("sit_forward_a")), recorded(name)) > 0.1


def test_ranks_and_alphas_by_pattern_are_understood():
    flat = opened(RECORDED / "lora").flat
    assert set(flat) == {"blocks/attn/qkv/kernel", "blocks/mlp/fc2/kernel", LABEL_TABLE}
    assert flat["blocks/mlp/fc2/kernel"].lora_a.shape == (2, 160, 2)
    assert not flat["blocks/mlp/fc2/kernel"].lora_a[1, :, 1].any()  # of rank 1 there
    assert flat[LABEL_TABLE].lora_a.shape == (11, 2)


@pytest.mark.parametrize("name", ["lora", "dora"])
def test_peft_to_ours_and_back_is_the_same_adapter(tmp_path, port, base, name):
    assert port(RECORDED / name, tmp_path / "ck", "--base", base)[0] == 0
    code, out, _ = port(tmp_path / "ck", tmp_path / "files", "--adapter", "peft")
    assert code == 0 and "for peft" in out
    ours, theirs = opened(tmp_path / "files").flat, opened(RECORDED / name).flat
    assert ours.keys() == theirs.keys()
    for path, node in theirs.items():
        again = ours[path]
        np.testing.assert_array_equal(again.lora_a, node.lora_a)
        np.testing.assert_array_equal(again.lora_b, node.lora_b)
        assert again.scale == pytest.approx(node.scale, rel=1e-15)
        if node.magnitude is not None:
            np.testing.assert_array_equal(again.magnitude, node.magnitude)
    mode = (tmp_path / "files" / peft.WEIGHTS).stat().st_mode
    assert mode & 0o044 == 0o044  # others may read it, as what we write elsewhere


def test_the_checkpoint_of_foreign_adapters_can_be_trained_on(tmp_path, port, base):
    assert port(RECORDED / "lora", tmp_path / "ck", "--base", base)[0] == 0
    meta = checkpoint.read_meta(tmp_path / "ck", 0)
    assert meta["base"]["path"] == str(base)
    parts = build_experiment(from_json(meta["config"]))
    assert parts.adapter.rank == 2
    names = {
        name.rpartition("/")[0]
        for name in checkpoint.leaves_by_name(adapter_shapes(parts))
    }
    assert names == set(opened(RECORDED / "lora").flat)


def test_diffusers_files_go_out_and_in(tmp_path, port, base):
    assert port(RECORDED / "lora", tmp_path / "ck", "--base", base)[0] == 0
    code, _, err = port(tmp_path / "ck", tmp_path / "d", "--adapter", "diffusers")
    assert code == 2 and "diffusers' files hold no label table" in err
    del (flat := opened(RECORDED / "lora").flat)[LABEL_TABLE]
    (tmp_path / "d").mkdir()
    peft.write_diffusers(tmp_path / "d", peft.to_pairs(DIT_RULES, flat))
    state = safetensors.numpy.load_file(tmp_path / "d" / peft.DIFFUSERS)
    assert "transformer.transformer_blocks.1.attn1.to_k.lora_B.weight" in state
    again = opened(tmp_path / "d")
    for path, node in flat.items():
        ours = again.flat[path].replace(base=0 * node.lora_a @ node.lora_b)
        theirs = node.replace(base=ours.base)
        np.testing.assert_allclose(ours.read(), theirs.read(), rtol=1e-5, atol=1e-7)
    # without the metadata, as older versions read it, alpha is the rank
    safetensors.numpy.save_file(state, tmp_path / "old.safetensors")
    for path, node in opened(tmp_path / "old.safetensors").flat.items():
        np.testing.assert_array_equal(node.lora_b, again.flat[path].lora_b)
        assert node.scale == again.flat[path].scale == 1.0


def test_new_rows_travel_as_pefts_whole_module(tmp_path, base):
    params = recorded_params("sit_forward_a")
    table = np.asarray(params["cond"]["label"]["embedding"])
    rows = np.full((2, 40), 3.0, np.float32)
    grown = np.asarray(materialize(ExtraRows(table, rows)))
    peft.write_peft(
        tmp_path, {"blocks.0.attn.proj": pair(1, 40, 40)}, "base", table=grown
    )
    state = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS)
    assert state["base_model.model.y_embedder.embedding_table.weight"].shape == (13, 40)
    flat = opened(tmp_path).flat
    np.testing.assert_array_equal(flat[LABEL_TABLE].new_rows, rows)
    assert isinstance(flat["blocks/attn/proj/kernel"], LoRAWeight)


def changed(tmp_path, config=None, **tensors):
    """A copy of the recorded adapter with other settings and more tensors."""
    folder = tmp_path / "changed"
    shutil.copytree(RECORDED / "lora", folder)
    told = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps({**told, **(config or {})}))
    state = safetensors.numpy.load_file(folder / peft.WEIGHTS)
    safetensors.numpy.save_file({**state, **tensors}, folder / peft.WEIGHTS)
    return folder


QKV = "base_model.model.blocks.0.attn.qkv.lora_"
ZEROS = np.zeros((2, 2), np.float32)


@pytest.mark.parametrize(
    ("settings", "tensors", "told"),
    [
        ({}, {"unet.conv_in.weight": ZEROS}, "1 tensors that are no adapter's: unet"),
        ({}, {f"{QKV}A.weight": np.zeros((2, 48), np.float32)}, r"is (120, 48) there"),
        ({}, {f"{QKV}A.weight": np.zeros((3, 40), np.float32)}, "no adapter"),
        (
            {},
            {
                f"base_model.model.blocks.7.attn.proj.lora_{m}.weight": ZEROS
                for m in "AB"
            },
            "another network: this one has no blocks.7.attn.proj",
        ),
        ({}, {"blocks.0.mlp.fc1.lora_A.weight": ZEROS}, "fc1 has no lora b matrix"),
        ({"peft_type": "LOHA"}, {}, "peft_type is 'LOHA', not 'LORA'"),
        ({"bias": "all"}, {}, "bias is 'all'; only 'none' is read"),
        ({"init_lora_weights": "pissa"}, {}, "which also changed the base"),
        ({"r": 4, "rank_pattern": {}}, {}, "has rank 2, the config says 4"),
    ],
)
def test_files_that_cannot_be_used_are_one_line(
    tmp_path, port, base, settings, tensors, told
):
    folder = changed(tmp_path, settings, **tensors)
    code, _, err = port(folder, tmp_path / "ck", "--base", base)
    assert code == 2 and told in err and err.count("\n") == 1, err
    assert not (tmp_path / "ck").exists()


def test_what_the_command_lacks_is_said(tmp_path, port, base):
    code, _, err = port(RECORDED / "lora", tmp_path / "ck")
    assert code == 2 and "add --base, the network they are of" in err
    code, _, err = port(base, tmp_path / "files", "--adapter", "peft")
    assert code == 2 and "a network of its own, no adapters" in err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").touch()
    words = (RECORDED / "lora", tmp_path / "mine", "--base", base, "--overwrite")
    code, _, err = port(*words)
    assert code == 2 and "it also holds notes" in err
    code, _, err = port(tmp_path / "none", tmp_path / "ck", "--base", base)
    assert code == 2 and err.count("\n") == 1


def test_a_weight_may_stand_behind_the_path():
    assert parse_adapter("runs/a") == ("runs/a", 1.0)
    assert parse_adapter("runs/a:0.8") == ("runs/a", 0.8)
    assert parse_adapter("a:-1") == ("a", -1.0)


def test_adapters_of_mdt_have_its_names():
    mdt = MDTv2(depth=4, decoder=2, width=16, heads=2, patch=2, classes=5)
    init = partial(init_params, mdt, (4, 4, 1))
    shapes = jax.eval_shape(init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    targets = ".*(decoder_blocks/attn/qkv|out_blocks/skip)/kernel"
    tree = LoRA(rank=2, targets=targets).add_adapters(zeros, jax.random.key(0))
    flat = flatten_dict(tree, is_leaf=lambda _, node: is_weight_leaf(node), sep="/")
    found = peft.to_pairs(MDTV2_RULES, flat)
    assert list(found) == [
        "en_outblocks.0.skip_linear",
        "de_blocks.0.attn.qkv",
        "de_blocks.1.attn.qkv",
    ]
    back = peft.from_pairs(MDTV2_RULES, flatten_dict(shapes, sep="/"), found, "x")
    assert back["out_blocks/skip/kernel"].lora_a.shape == (1, 32, 2)
