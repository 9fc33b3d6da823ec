"""diffusers' folders of a DiT, both ways, and what diffusers computes with them."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
import torch
from helpers import small
from helpers.networks import quick_jit
from helpers.recorded import FOLDER, arrays, nchw, nhwc, relative, weights
from helpers.small import called

from sit_jax.cli import port_weights, sample
from sit_jax.config import spec
from sit_jax.convert import diffusers
from sit_jax.convert.rules import DIT_RULES, to_flax
from sit_jax.errors import UserError
from sit_jax.models import layers
from sit_jax.models.dit import DiT, SiT

DIT_A = FOLDER / "weights" / "dit_a.pt"
MODEL = DiT(depth=2, width=40, heads=4, patch=2, classes=10)
SHAPE = (8, 8, 4)
FILE = diffusers.WEIGHTS


@pytest.fixture
def port(monkeypatch, capsys):
    main = port_weights.main
    return lambda *arguments: called(main, monkeypatch, capsys, *arguments)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """dit_a.pt as a checkpoint, and that as a folder of diffusers."""
    folder = tmp_path_factory.mktemp("exported")
    lines = [
        (DIT_A, folder / "ck", "--family", "dit", "--heads", 4),
        (folder / "ck", folder / "hub", "--to", "diffusers"),
    ]
    for words in lines:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["port_weights.py", *map(str, words)])
            with pytest.raises(SystemExit, match="^0$"):
                port_weights.main()
    return folder


def changed(folder, target, names=None, **fields):
    """A copy of a diffusers folder with another config or other tensors."""
    target.mkdir()
    config = json.loads((folder / "config.json").read_text()) | fields
    (target / "config.json").write_text(json.dumps(config))
    tensors = safetensors.numpy.load_file(folder / FILE)
    safetensors.numpy.save_file((names or dict)(tensors), target / FILE)
    return target


def test_the_names_and_numbers_are_those_of_diffusers(exported):
    """Its constructor, whose defaults the config of facebook/DiT-XL-2-256 overrides."""
    config = json.loads((exported / "hub" / "config.json").read_text())
    assert config["num_attention_heads"] * config["attention_head_dim"] == 40
    assert (config["out_channels"], config["num_embeds_ada_norm"]) == (8, 10)
    found = safetensors.numpy.load_file(exported / "hub" / FILE)
    # what DiTTransformer2DModel(**config) has: counted by diffusers 0.42.1
    assert sum(tensor.size for tensor in found.values()) == 88_792
    qkv = weights("dit_a")["blocks.1.attn.qkv.weight"]
    np.testing.assert_array_equal(
        found["transformer_blocks.1.attn1.to_k.weight"], qkv[40:80]
    )
    table = weights("dit_a")["y_embedder.embedding_table.weight"]
    for i in (0, 1):
        name = f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table"
        np.testing.assert_array_equal(found[f"{name}.weight"], table)


def test_there_and_back_is_the_same(exported, tmp_path, port):
    code, out, err = port(exported / "hub", tmp_path / "ck")
    assert (code, err) == (0, ""), err
    assert "DiT: depth 2, width 40, heads 4, patch 2" in out
    code, out, err = port(tmp_path / "ck", tmp_path / "x.pt")
    assert (code, err) == (0, "")
    back = torch.load(tmp_path / "x.pt", weights_only=True)
    assert list(back) == list(weights("dit_a"))
    for name, array in weights("dit_a").items():
        np.testing.assert_array_equal(back[name], array)


def test_both_ways_to_compute_agree_with_what_was_recorded():
    """The released network, and diffusers' with the same weights."""
    golden, params = arrays("dit_forward_a"), to_flax(DIT_RULES, weights("dit_a"))[0]
    theirs = arrays("dit_diffusers")["out"]
    as_diffusers = dataclasses.replace(MODEL, frequency_shift=1.0, norm2_epsilon=1e-5)
    inputs = (nhwc(golden["x"]), golden["t"], golden["y"])
    run = lambda model: nchw(quick_jit(model.apply)({"params": params}, *inputs))
    # their table of frequencies is float32's, whose last bits t = 999 multiplies
    assert relative(run(as_diffusers), theirs) < 2e-5
    assert relative(run(MODEL), golden["out"]) < 2e-5
    assert relative(run(MODEL), theirs) > 0.3


def test_the_shifted_frequencies_are_those_of_the_formula():
    wanted = 10_000.0 ** (-np.arange(128) / 127)
    np.testing.assert_allclose(layers.timestep_frequencies(128, 1.0), wanted, rtol=1e-6)


def test_the_difference_is_measured_and_stands_in_the_card(exported, tmp_path, port):
    params = to_flax(DIT_RULES, weights("dit_a"))[0]
    from sit_jax.convert.model_card import numeric_gap

    found = numeric_gap(MODEL, SHAPE, params, times=(5, 999))
    assert found[5] < 0.05 < 0.1 < found[999]
    figures = tmp_path / "fid.json"
    figures.write_text('{"fid": 12.5}')
    code, out, err = port(
        *(exported / "ck", tmp_path / "hub", "--to", "diffusers"),
        *("--figures", figures),
    )
    assert (code, err) == (0, "")
    assert "relative L2 difference 1" in out or "relative L2 difference 0" in out
    text = (tmp_path / "hub" / "README.md").read_text()
    for said in (
        "| network | DiT |",
        "| converted from | dit_a.pt |",
        "DiTTransformer2DModel.from_pretrained",
        "relative L2 difference",
        '"fid": 12.5',
        "the licence of that file holds",
        '"sit_jax.models.dit.DiT"',
        f"| sha256 of {FILE} |",
    ):
        assert said in text, said


def test_a_sit_is_exported_with_a_loader(tmp_path, port):
    c = small.config()
    c.model = spec(SiT, depth=2, width=16, heads=2, patch=2, classes=5)
    small.checkpoint(tmp_path / "ck", c)
    code, _, err = port(tmp_path / "ck", tmp_path / "hub", "--to", "diffusers")
    assert code == 2 and "no class for a SiT; --to released" in err
    assert not (tmp_path / "hub").exists()
    code, _, err = port(tmp_path / "ck", tmp_path / "hub", "--to", "released")
    assert (code, err) == (0, "")
    text = (tmp_path / "hub" / "README.md").read_text()
    assert "from models import SiT" in text and "Trained with sit_jax" in text
    found = safetensors.numpy.load_file(tmp_path / "hub" / "model.safetensors")
    assert "blocks.1.attn.qkv.weight" in found


def test_samples_come_from_the_folder_itself(exported):
    found = sample._open(exported / "hub")
    assert found.config.model.make is DiT and found.config.model.heads == 4


def another_embedder(tensors):
    name = "transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"
    return {**tensors, name: tensors[name] + 1}


def renamed(tensors):
    return {
        ("proj_out_3.bias" if n == "proj_out_2.bias" else n): t
        for n, t in tensors.items()
    }


@pytest.mark.parametrize(
    "names, fields, said",
    [
        (None, {"_class_name": "UNet2DModel"}, "is of a UNet2DModel"),
        (None, {"norm_type": "layer_norm"}, "norm_type is 'layer_norm', a DiT has"),
        (None, {"num_layers": 3}, "missing transformer_blocks.2.attn1.to_k.bias"),
        (None, {"sample_size": 9}, "sample_size 9 is no multiple of patch_size 2"),
        (None, {"num_layers": "two"}, "num_layers is 'two', no positive number"),
        (another_embedder, {}, "one embedder for all blocks"),
        (renamed, {}, "missing proj_out_2.bias; extra proj_out_3.bias"),
    ],
)
def test_other_networks_are_refused(exported, tmp_path, port, names, fields, said):
    folder = changed(exported / "hub", tmp_path / "hub", names, **fields)
    code, _, err = port(folder, tmp_path / "ck")
    assert code == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / "ck").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["CK", "x.pt", "--to", "diffusers"],
            "--to diffusers writes a folder, of a checkpoint",
        ),
        (["HUB", "OUT", "--to", "released"], "--to released writes a folder"),
        (["CK", "OUT"], "or --to diffusers or released"),
        (["CK", "OUT", "--to", "onnx"], "--to 'onnx' (one of 'diffusers', 'released')"),
        (["HUB", "OUT", "--figures", "f.json"], "goes into the card of an export"),
        (
            ["CK", "OUT", "--to", "released", "--figures", "no.json"],
            "no.json: No such file",
        ),
        (["HUB", "OUT", "--heads", 8], "heads: --heads says 8, but"),
        (["HUB", "OUT", "--family", "sit"], "by its config.json, says dit"),
    ],
)
def test_wrong_use_is_one_line(exported, tmp_path, port, words, said):
    places = {"CK": exported / "ck", "HUB": exported / "hub", "OUT": tmp_path / "out"}
    words = [places.get(word, word) for word in words]
    code, _, err = port(*words)
    assert code == 2 and said in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_a_network_that_diffusers_cannot_hold_is_refused():
    odd = dataclasses.replace(MODEL, mlp_ratio=2.0)
    with pytest.raises(UserError, match="mlp_ratio of 4, not 2.0"):
        diffusers.diffusers_config(odd, SHAPE)
