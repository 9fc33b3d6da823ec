"""Torch files: read without running code, all layouts, written as torch writes them."""

import argparse
import json

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.recorded import FOLDER, weights
from helpers.torch_files import RNG, same, saved, state

from sit_jax.convert import tensor_files
from sit_jax.convert.state_dict import read_torch_file
from sit_jax.errors import UserError


def test_read_torch_file_takes_a_bare_state_dict_as_model_and_ema():
    file = read_torch_file(FOLDER / "weights" / "sit_a.pt")
    same(file.ema, weights("sit_a"))
    assert file.model is file.ema
    assert (file.adam, file.args, file.ignored) == (None, None, ())
    assert file.ema.shapes["pos_embed"] == (1, 16, 40)


@pytest.mark.parametrize("key", ["ema", "model", "state_dict"])
def test_read_torch_file_finds_one_state_dict_under_a_name(tmp_path, key):
    tensors = state()
    file = read_torch_file(saved(tmp_path, {key: tensors, "epoch": 3}))
    same(file.ema, tensors)
    same(file.model, tensors)
    assert file.ignored == ("epoch",)


def test_read_torch_file_refuses_two_tensors_of_one_name(tmp_path):
    twice = state() | {"module.a.bias": torch.ones(5)}
    with pytest.raises(UserError, match="two tensors for a.bias"):
        read_torch_file(saved(tmp_path, twice))


GOLDEN = (FOLDER / "weights" / "sit_c.pt").read_bytes()
SAFE = safetensors.torch.save({"a": torch.ones(50)})


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("x.pt", b"", "damaged"),
        ("x.pt", GOLDEN[: len(GOLDEN) // 2], "damaged"),
        ("x.pt", GOLDEN[:-30], "damaged"),
        ("x.pt", b"PK\x03\x04", "damaged"),  # a download that has just begun
        ("x.pt", RNG.bytes(4_000), "damaged"),
        ("x.pt", b"PK\x03\x04" + RNG.bytes(4_000), "damaged"),
        ("x.pt", b"<html>not found</html>", "damaged"),
        ("x.safetensors", b"", "damaged"),
        ("x.safetensors", SAFE[:-9], "damaged"),
        ("x.safetensors", RNG.bytes(4_000), "damaged"),
        ("x.ckpt", GOLDEN, "does not end in .pt"),
    ],
)
def test_read_torch_file_refuses_damaged_files(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        read_torch_file(tmp_path / name)
    with pytest.raises(UserError, match="no file at"):
        read_torch_file(tmp_path / f"no-{name.replace('ckpt', 'pt')}")
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([torch.ones(2)], "holds a list"),
        ({"epoch": 3, "model": {}}, "no weights, only epoch, model"),
        ({"a": torch.ones(2, dtype=torch.int64)}, "a is int64, not float32"),
        ({"a": torch.ones(2, dtype=torch.float64)}, "a is float64, not float32"),
        ({"ema": state(), "args": argparse.Namespace(x=[1])}, "args.x"),
    ],
)
def test_read_torch_file_refuses_other_contents(tmp_path, content, told):
    with pytest.raises(UserError, match=told):
        read_torch_file(saved(tmp_path, content))


def test_read_torch_file_reads_files_before_torch_1_6(tmp_path):
    tensors = state()
    path = saved(tmp_path, tensors, _use_new_zipfile_serialization=False)
    same(read_torch_file(path).ema, tensors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_read_torch_file_makes_floats_of_halves(tmp_path, dtype, ending):
    tensors = {name: x.to(dtype) for name, x in state().items()}
    path = tmp_path / f"x.{ending}"
    save = torch.save if ending == "pt" else safetensors.torch.save_file
    save(tensors, path)
    read = read_torch_file(path).ema
    assert read.dtypes == [str(dtype).removeprefix("torch.")]
    same(read, {name: tensors[name].float() for name in read})


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_tensor_file_opens_anew_after_many_bytes(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(tensor_files, "REOPEN_AFTER", 300)  # of files of 2,000 bytes
    tensors = {f"t{i}": np.float32(RNG.normal(size=(5, 5))) for i in range(20)}
    path = tmp_path / f"x.{ending}"
    tensor_files.write(path, tensors)
    file, contents = tensor_files.open_file(path), []
    for name, array in tensors.items():
        contents.append(file.content())
        np.testing.assert_array_equal(file.read((name,)), array)
    assert len({id(content) for content in contents}) >= 5


def test_write_gives_safetensors_that_the_library_reads(tmp_path):
    tensors = {name: x.numpy() for name, x in state(c=torch.ones(())).items()}
    tensor_files.write(tmp_path / "x.safetensors", tensors)
    read = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in read.items():
        np.testing.assert_array_equal(tensor, tensors[name])


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_fsdp_wrapped_module.", "base_model.model.", "module._orig_mod."],
)
@pytest.mark.parametrize("inner", ["", "_orig_mod.", "_checkpoint_wrapped_module."])
def test_read_torch_file_drops_prefixes_of_wrappers(tmp_path, prefix, inner):
    tensors = state()
    names = {prefix + n.replace(".", f".{inner}"): x for n, x in tensors.items()}
    for content in (names, {"module": names}, {"ema": names}):
        same(read_torch_file(saved(tmp_path, content)).ema, tensors)


def test_read_torch_file_takes_an_ema_of_shadow_params(tmp_path):
    """As torch_ema and diffusers save it: in the order of trained parameters."""
    model = {"pos_embed": torch.ones(1, 4, 2), **state()}
    shadow = [torch.randn(x.shape) for name, x in model.items() if name != "pos_embed"]
    content = {"model": model, "ema": {"decay": 0.9, "shadow_params": shadow}}
    file = read_torch_file(saved(tmp_path, content))
    same(file.model, model)
    same(file.ema, {**model, **dict(zip(list(model)[1:], shadow, strict=True))})
    content["ema"]["shadow_params"] = shadow[1:]
    with pytest.raises(UserError, match="ema has 1 tensors, model 3"):
        read_torch_file(saved(tmp_path, content))


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_read_torch_file_reads_a_file_in_parts(tmp_path, ending):
    arrays = {name: x.numpy() for name, x in state(c=torch.ones(2)).items()}
    weight_map = {}
    for i, (name, array) in enumerate(arrays.items()):
        weight_map[name] = f"x-{i}.{ending}"
        tensor_files.write(tmp_path / weight_map[name], {name: array})
    index = tmp_path / f"x.{ending}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    same(read_torch_file(index).ema, arrays)
    weight_map["c"] = weight_map["a.bias"]
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="c is not in its file"):
        read_torch_file(index)
    for content in ("[1]", "[" * 10**5, json.dumps({"weight_map": {"c": 1}})):
        index.write_text(content)
        with pytest.raises(UserError, match="index.json is damaged"):
            read_torch_file(index)
    index.write_text(json.dumps({"weight_map": {"c": index.name}}))
    with pytest.raises(UserError, match=f"names {index.name}, a list like itself"):
        read_torch_file(index)
