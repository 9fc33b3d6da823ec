"""Where Inception's weights are looked for, and in which files they are understood."""

import hashlib
import json

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import unflatten_dict
from tensorboardX.proto.graph_pb2 import GraphDef

from sit_jax.convert import inception as inception_files
from sit_jax.convert.inception import (
    CONVERTED,
    FILE,
    SIZE,
    load_inception,
)
from sit_jax.convert.rules import to_torch
from sit_jax.errors import UserError
from sit_jax.manifest import weights_hash
from sit_jax.models import inception

SHAPES = {  # the first layer and the last one, narrow
    "Conv2d_1a_3x3/kernel": (3, 3, 3, 4),
    "Conv2d_1a_3x3/scale": (4,),
    "Conv2d_1a_3x3/bias": (4,),
    "Conv2d_1a_3x3/mean": (4,),
    "Conv2d_1a_3x3/var": (4,),
    "fc/kernel": (4, 5),
    "fc/bias": (5,),
}
RULES, TF_RULES = (
    tuple(rule for rule in rules if rule[1] in SHAPES)
    for rules in (inception.RULES, inception.TF_RULES)
)
FLOAT, INT32 = 1, 3  # TensorFlow's numbers for them


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """A narrow network, and caches of its own; -> the folder."""
    like = {
        path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in SHAPES.items()
    }
    shapes = lambda: unflatten_dict(like, sep="/")
    changed = {"RULES": RULES, "TF_RULES": TF_RULES, "param_shapes": shapes}
    for name, value in changed.items():
        monkeypatch.setattr(inception_files, name, value)
    monkeypatch.setenv("SIT_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "cache"


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {p: rng.standard_normal(s, np.float32) for p, s in SHAPES.items()}


def tree():
    return unflatten_dict(params(), sep="/")


def torch_file(path, **more):
    """A state dict with the counters that pytorch-fid's file has."""
    state = to_torch(RULES, tree())
    state = {name: torch.from_numpy(array) for name, array in state.items()} | more
    state["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(7)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


@pytest.fixture
def released(monkeypatch, tmp_path):
    """A .pth that counts as the released one."""
    path = torch_file(tmp_path / FILE)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(inception_files, "SHA256", sha)
    return path


def graph(path, odd=None):
    """A frozen graph with all constants, as TensorFlow writes them, and more."""
    graph, flat = GraphDef(), params()
    for name, place, _ in TF_RULES:
        array = flat[place]
        node = graph.node.add(name=name, op="Const")
        node.attr["dtype"].type = FLOAT
        tensor = node.attr["value"].tensor
        tensor.dtype = FLOAT
        for size in array.shape:
            tensor.tensor_shape.dim.add(size=size)
        if name.endswith("beta"):  # small ones are lists of numbers
            tensor.float_val.extend(array.ravel().tolist())
        else:
            tensor.tensor_content = array.tobytes()
    axis = graph.node.add(name="mixed/join/concat_dim", op="Const")
    axis.attr["value"].tensor.dtype = INT32
    axis.attr["value"].tensor.int_val.append(3)
    ones = graph.node.add(name="ones", op="Const").attr["value"].tensor
    ones.dtype = FLOAT
    ones.float_val.append(1.0)
    for size in (2, 3):
        ones.tensor_shape.dim.add(size=size)
    graph.node.add(name="conv", op="Relu", input=["conv/batchnorm"])
    path.write_bytes(graph.SerializeToString())
    return path


def assert_same(found):
    for path, array in params().items():
        folder, leaf = path.split("/")
        np.testing.assert_array_equal(found.params[folder][leaf], array)
    assert found.sha256 == weights_hash(tree())


def test_a_state_dict_is_read(tmp_path, cache):
    found = load_inception(torch_file(tmp_path / "x.pth"))
    assert_same(found)
    assert not found.is_published and not cache.exists()


def test_the_released_file_is_converted_once(released, cache):
    found = load_inception(released)
    assert_same(found)
    assert found.is_published
    released.unlink()
    again = load_inception()  # from the cache, without the original
    assert_same(again)
    assert again.is_published and again.path == cache / CONVERTED


def test_a_converted_file_that_changed_is_refused(released, cache):
    load_inception(released)
    data = bytearray((cache / CONVERTED).read_bytes())
    data[-1] ^= 1
    (cache / CONVERTED).write_bytes(data)
    with pytest.raises(UserError, match=r"safetensors has changed .* remove it"):
        load_inception()


def test_a_safetensors_from_elsewhere_is_read_and_not_trusted(
    released, cache, tmp_path
):
    load_inception(released)
    other = tmp_path / "x.safetensors"
    other.write_bytes((cache / CONVERTED).read_bytes())
    found = load_inception(other)
    assert_same(found)
    assert not found.is_published


def test_a_cache_that_cannot_be_written_is_no_error(released, cache):
    cache.write_text("a file in the way")
    assert_same(load_inception(released))


@pytest.mark.parametrize("place", ["cache", "torch/hub/checkpoints"])
def test_a_file_with_other_bytes_under_the_released_name_is_refused(tmp_path, place):
    torch_file(tmp_path / place / FILE)
    with pytest.raises(
        UserError, match=rf"{FILE} is damaged: its sha256 is \w+, not 672"
    ):
        load_inception()


def test_missing_weights_are_named_with_size_hash_and_place(cache):
    with pytest.raises(UserError) as error:
        load_inception()
    said = str(error.value)
    assert said.startswith("no Inception weights; put pt_inception-2015-12-05-6726825d")
    assert f"{SIZE} bytes, sha256 {inception_files.SHA256}" in said
    assert f"into {cache}" in said and "--inception" in said and "\n" not in said


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fc.weight": torch.zeros(1000, 4)}, r"fc/kernel is \(4, 1000\), not"),
        (
            {"AuxLogits.fc.bias": torch.zeros(3)},
            "another network: it also has AuxLogits",
        ),
        ({"fc.bias": torch.zeros(5, dtype=torch.int32)}, "fc.bias is int32"),
        ({"extra": object}, "x.pth"),
    ],
    ids=["shape", "spare", "integers", "objects"],
)
def test_other_networks_are_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        load_inception(torch_file(tmp_path / "x.pth", **change))


def test_the_tensorflow_graph_holds_the_same(tmp_path, cache):
    found = load_inception(graph(tmp_path / "classify_image_graph_def.pb"))
    assert_same(found)
    assert found.is_published
    assert json.loads((cache / CONVERTED).with_suffix(".json").read_text())["released"]
    assert_same(load_inception())


@pytest.mark.parametrize("cut", [1, 40, 300])
def test_a_damaged_graph_is_refused(tmp_path, cut):
    path = graph(tmp_path / "x.pb")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match="x.pb"):
        load_inception(path)
