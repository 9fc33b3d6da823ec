"""Weights from torch state dicts to Flax trees and back, bit by bit, or refused."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers.networks import random_state, released_entries, shapes
from helpers.recorded import arrays, case, weights

from sit_jax.checkpoint import require_same_shapes
from sit_jax.convert.rules import (
    DIT_RULES,
    flatten_dict,
    to_flax,
    to_torch,
    torch_constants,
)
from sit_jax.errors import UserError
from sit_jax.models.dit import SIZES, DiT, SiT


@pytest.mark.parametrize(("size", "patch"), [*zip(SIZES, [2, 4, 8, 2], strict=True)])
def test_rules_round_trip_is_bit_equal_for_published_depths(size, patch):
    depth = SIZES[size]["depth"]
    state = random_state(depth, patch=patch)
    assert len(state) == 12 + 10 * depth
    params, spare = to_flax(DIT_RULES, state)
    assert spare == {"pos_embed"}
    model = SiT(depth=depth, width=16, heads=2, patch=patch, classes=3)
    require_same_shapes("params", params, shapes(model, 8))
    back = {"pos_embed": state["pos_embed"]} | to_torch(DIT_RULES, params)
    assert_same(back, state)
    again, _ = to_flax(DIT_RULES, back)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype, name
        assert ours[name].flags.c_contiguous and ours[name].flags.owndata, name
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.parametrize("name", ["sit_a", "sit_b", "sit_c", "dit_a", "dit_b"])
def test_rules_give_recorded_files_back_in_order_with_constants(name):
    theirs, side = weights(name), case(f"{name[:3]}_forward_{name[4:]}")["model"]
    params, _ = to_flax(DIT_RULES, theirs)
    m = DiT(width=side["hidden_size"], patch=side["patch_size"])
    fixed = torch_constants(m, side["input_size"])
    # The table is sines in float64, rounded once: 1e-7 allows for the last bit.
    np.testing.assert_allclose(fixed["pos_embed"], theirs["pos_embed"], atol=1e-7)
    ours = fixed | to_torch(DIT_RULES, jax.tree.map(jnp.asarray, params))
    assert (
        list(ours)
        == list(theirs)
        == case(f"{name[:3]}_forward_{name[4:]}")["state_dict_keys"]
    )
    for key in theirs.keys() - {"pos_embed"}:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def test_to_flax_takes_names_in_any_order():
    """safetensors sorts by name, which puts layer 10 before layer 2."""
    state = random_state(depth=12)
    params, _ = to_flax(DIT_RULES, {name: state[name] for name in sorted(state)})
    assert_same({"pos_embed": state["pos_embed"]} | to_torch(DIT_RULES, params), state)


def test_to_torch_keeps_order_and_depth_of_two_runs_of_layers():
    """As in networks with an encoder and a decoder."""
    rules = [
        ("in.*.w", "in/w", "oi->io"),
        ("in.*.b", "in/b", "o->o"),
        ("mid", "mid", "o->o"),
        ("out.*.w", "out/w", "oi->io"),
    ]
    params = {
        "in": {
            "w": np.arange(12.0).reshape(2, 2, 3),
            "b": np.arange(6.0).reshape(2, 3),
        },
        "mid": np.ones(2),
        "out": {"w": np.arange(3.0).reshape(3, 1, 1)},
    }
    state = to_torch(rules, params)
    names = "in.0.w in.0.b in.1.w in.1.b mid out.0.w out.1.w out.2.w".split()
    assert list(state) == names
    back, spare = to_flax(rules, state)
    assert not spare and jax.tree.all(jax.tree.map(np.array_equal, back, params))


def test_dit_rules_match_names_of_the_official_constructor():
    """Names and shapes of the official constructor, other widths and patches."""
    golden = case("init_stats")["models"][1]
    k = golden["kwargs"]
    entries = list(
        released_entries(
            k["depth"],
            k["hidden_size"],
            k["patch_size"],
            k["num_classes"],
            side=k["input_size"],
        )
    )
    assert [name for name, _ in entries] == golden["names"]
    assert [list(shape) for _, shape in entries] == golden["shapes"]
    assert len(arrays("init_stats")[golden["cls"]]) == len(entries)


def test_to_flax_and_to_torch_share_no_memory_with_the_source():
    state = random_state()
    params, _ = to_flax(DIT_RULES, state)
    back = to_torch(DIT_RULES, params)
    for name, array in flatten_dict(params, sep="/").items():
        assert not any(np.shares_memory(array, a) for a in state.values()), name
        assert not any(np.shares_memory(array, a) for a in back.values()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_flax_takes_torch_tensors_and_keeps_the_dtype(dtype):
    state = random_state()
    tensors = {name: torch.from_numpy(a).to(dtype) for name, a in state.items()}
    params, _ = to_flax(DIT_RULES, tensors)
    expected, _ = to_flax(DIT_RULES, state)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, expected))
    names = {str(a.dtype) for a in jax.tree.leaves(params)}
    assert names == {str(dtype).removeprefix("torch.")}


def size(tree):
    return sum(array.nbytes for array in jax.tree.leaves(tree))


def peak_growth(convert):
    tracemalloc.start()
    result = convert()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, result


class Lazy(dict):
    """Entries read from a file on access, as safetensors does."""

    def __getitem__(self, name):
        return super().__getitem__(name).copy()


def test_to_flax_holds_one_entry_at_a_time_beside_the_result():
    state = random_state(depth=6, width=64)
    peak, (params, _) = peak_growth(lambda: to_flax(DIT_RULES, Lazy(state)))
    largest = max(array.nbytes for array in jax.tree.leaves(params))
    assert peak < size(params) + largest / 2


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("final_layer.linear.bias", "final_layer.linear.bias: "),
        ("blocks.1.mlp.fc2.bias", "blocks.1.mlp.fc2.bias: "),
        ("blocks.2.mlp.fc2.bias", "blocks.2.mlp.fc2.bias: "),  # of the last layer
        ("blocks.1.", "blocks.1.attn.qkv.weight.* and 2 more"),
        ("", "x_embedder.proj.weight.*more"),
    ],
)
def test_to_flax_lists_missing_entries(gone, named):
    state = {k: v for k, v in random_state(depth=3).items() if not k.startswith(gone)}
    with pytest.raises(UserError, match=f"weights lack {named}") as error:
        to_flax(DIT_RULES, state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, array, message",
    [
        ("blocks.1.mlp.fc1.bias", np.zeros(3, np.float32), "float32.3,. is not like"),
        ("blocks.1.mlp.fc1.bias", np.zeros(64, np.float16), "float16.64,. is not like"),
        ("x_embedder.proj.weight", np.zeros((16, 16), np.float32), "has not 4 axes"),
    ],
)
def test_to_flax_lists_misshapen_entries(name, array, message):
    state = random_state() | {name: array}
    with pytest.raises(UserError, match=f"{name} .*{message}"):
        to_flax(DIT_RULES, state)


def test_to_flax_hands_unknown_entries_back():
    state = random_state() | {"blocks.0.attn.q_norm.weight": np.ones(8)}
    _, spare = to_flax(DIT_RULES, state)
    assert spare == {"pos_embed", "blocks.0.attn.q_norm.weight"}


def test_to_torch_refuses_leaves_without_a_rule_or_layer():
    params, _ = to_flax(DIT_RULES, random_state())
    with pytest.raises(UserError, match="do not share hidden"):
        to_torch(DIT_RULES, params | {"hidden": np.zeros(2)})
    with pytest.raises(UserError, match="do not share patch/bias, patch/kernel"):
        to_torch(DIT_RULES, {k: v for k, v in params.items() if k != "patch"})
    params["blocks"]["adaLN"]["bias"] = np.zeros((3, 96))
    with pytest.raises(UserError, match="blocks/adaLN/bias has 3 layers, not 2"):
        to_torch(DIT_RULES, params)
