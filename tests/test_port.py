"""Weights from torch state dicts to Flax trees and back, bit by bit."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_state, released_entries, shapes
from recorded import arrays, case, weights

from sit_jax.convert import port
from sit_jax.models.dit import RULES, SIZES, DiT, SiT, constants


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("size", SIZES)
def test_round_trip_is_bit_equal_for_every_published_depth(size, patch):
    depth = SIZES[size]["depth"]
    state = random_state(depth, patch=patch)
    assert len(state) == 12 + 10 * depth
    params, spare = port.to_flax(RULES, state)
    assert spare == {"pos_embed"}
    model = SiT(depth=depth, width=16, heads=2, patch=patch, classes=3)
    port.require_match(shapes(model, 8), params)
    back = {"pos_embed": state["pos_embed"]} | port.to_torch(RULES, params)
    assert_same(back, state)
    again, _ = port.to_flax(RULES, back)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))


def assert_same(ours, theirs):
    assert list(ours) == list(theirs)
    for name, array in theirs.items():
        assert ours[name].dtype == array.dtype, name
        assert ours[name].flags.c_contiguous and ours[name].flags.owndata, name
        np.testing.assert_array_equal(ours[name], array, err_msg=name)


@pytest.mark.parametrize("name", ["sit_a", "sit_b", "sit_c", "dit_a", "dit_b"])
def test_recorded_files_come_back_with_their_order_and_constant(name):
    theirs, side = weights(name), case(f"{name[:3]}_forward_{name[4:]}")["model"]
    params, _ = port.to_flax(RULES, theirs)
    m = DiT(width=side["hidden_size"], patch=side["patch_size"])
    fixed = constants(m, side["input_size"])
    # The table is sines in float64, rounded once: 1e-7 allows for the last bit.
    np.testing.assert_allclose(fixed["pos_embed"], theirs["pos_embed"], atol=1e-7)
    ours = fixed | port.to_torch(RULES, jax.tree.map(jnp.asarray, params))
    assert (
        list(ours)
        == list(theirs)
        == case(f"{name[:3]}_forward_{name[4:]}")["state_dict_keys"]
    )
    for key in theirs.keys() - {"pos_embed"}:
        np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def test_order_of_the_source_does_not_matter():
    """safetensors sorts by name, which puts layer 10 before layer 2."""
    state = random_state(depth=12)
    params, _ = port.to_flax(RULES, {name: state[name] for name in sorted(state)})
    assert_same({"pos_embed": state["pos_embed"]} | port.to_torch(RULES, params), state)


def test_two_runs_of_layers_keep_their_own_order_and_depth():
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
    state = port.to_torch(rules, params)
    names = [
        "in.0.w",
        "in.0.b",
        "in.1.w",
        "in.1.b",
        "mid",
        "out.0.w",
        "out.1.w",
        "out.2.w",
    ]
    assert list(state) == names
    back, spare = port.to_flax(rules, state)
    assert not spare and jax.tree.all(jax.tree.map(np.array_equal, back, params))


def test_recorded_initial_order_matches_the_rules():
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


def test_layouts_are_those_of_the_two_frameworks():
    state = random_state()
    params, _ = port.to_flax(RULES, state)
    kernel, weight = params["patch"]["kernel"], state["x_embedder.proj.weight"]
    assert kernel[1, 0, 2, 5] == weight[5, 2, 1, 0]
    fc1 = params["blocks"]["mlp"]["fc1"]["kernel"]
    assert fc1[1, 3, 60] == state["blocks.1.mlp.fc1.weight"][60, 3]


def test_results_do_not_share_memory_with_the_source():
    state = random_state()
    params, _ = port.to_flax(RULES, state)
    back = port.to_torch(RULES, params)
    for name, array in port.flatten_dict(params, sep="/").items():
        assert not any(np.shares_memory(array, a) for a in state.values()), name
        assert not any(np.shares_memory(array, a) for a in back.values()), name


def test_torch_tensors_are_taken_as_they_are():
    import torch

    state = {name: torch.from_numpy(a) for name, a in random_state().items()}
    params, _ = port.to_flax(RULES, state)
    plain, _ = port.to_flax(RULES, random_state())
    assert jax.tree.all(jax.tree.map(np.array_equal, params, plain))


def test_optimizer_moments_of_another_dtype_keep_it():
    state = {name: a.astype(np.float64) for name, a in random_state().items()}
    params, _ = port.to_flax(RULES, state)
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype(np.float64)}


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


def test_one_entry_at_a_time_is_held_beside_the_result():
    state = random_state(depth=6, width=64)
    peak, (params, _) = peak_growth(lambda: port.to_flax(RULES, Lazy(state)))
    largest = max(array.nbytes for array in jax.tree.leaves(params))
    assert peak < size(params) + largest / 2


@pytest.mark.parametrize("direction", ["to_flax", "to_torch"])
def test_consumed_weights_are_never_held_twice(direction):
    """Peak with the source included: the result and at most one stacked leaf."""

    def convert():
        state = random_state(depth=6, width=64)
        if direction == "to_flax":
            return port.to_flax(RULES, state, consume=True)[0]
        params, _ = port.to_flax(RULES, state, consume=True)
        return port.to_torch(RULES, params, consume=True)

    peak, result = peak_growth(convert)
    largest = max(
        a.nbytes for a in jax.tree.leaves(port.to_flax(RULES, random_state(6, 64))[0])
    )
    assert peak < size(result) + 1.2 * largest


def test_consuming_leaves_only_what_is_spare():
    state = random_state()
    params, spare = port.to_flax(RULES, state, consume=True)
    assert set(state) == spare == {"pos_embed"}
    port.to_torch(RULES, params, consume=True)
    assert not jax.tree.leaves(params)
