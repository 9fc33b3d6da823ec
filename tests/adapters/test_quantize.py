"""int8 and 4-bit weights: their codes, their products, their networks."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from helpers.networks import quick_jit
from helpers.recorded import relative

from sit_jax.adapters.apply import apply_model
from sit_jax.adapters.quantize import (
    SKIP,
    quantize_params,
    quantize_stream,
    quantized_shapes,
    tree_bytes,
)
from sit_jax.adapters.weights import (
    Int4Weight,
    Int8ActivationWeight,
    Int8Weight,
    is_weight_leaf,
    materialize,
)
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((3, 64, 24)).astype(np.float32)
X = RNG.standard_normal((5, 7, 64)).astype(np.float32)
PARTS = build_experiment(small.config())
PARAMS = small.random_params(PARTS, 0)


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=is_weight_leaf)


def test_eight_bits_round_to_the_nearest_of_their_channel():
    stored = Int8Weight.from_float(WEIGHT)
    step = np.abs(WEIGHT).max(axis=1, keepdims=True) / 127
    assert stored.codes.dtype == jnp.int8 and stored.shape == WEIGHT.shape
    assert np.abs(stored.read() - WEIGHT).max() <= 0.5001 * step.max()
    assert (np.abs(stored.read() - WEIGHT) <= 0.5001 * step).all()
    assert (np.abs(stored.codes).max(axis=1) == 127).all()


def test_four_bits_round_to_the_nearest_of_their_group():
    stored = Int4Weight.from_float(WEIGHT, 16)
    groups = WEIGHT.reshape(3, 4, 16, 24)
    step = np.abs(groups).max(axis=2, keepdims=True) / 7
    off = np.abs(np.asarray(stored.read()).reshape(groups.shape) - groups)
    assert (off <= 0.5001 * step).all() and stored.shape == WEIGHT.shape
    assert stored.codes.nbytes == WEIGHT.size / 2
    wanted = np.round(groups / step)  # codes in order, through the bytes
    found = np.asarray(stored.read()).reshape(groups.shape) / step
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_zero_weights_stay_zero():
    zero = np.zeros((4, 2), np.float32)
    for stored in (
        Int8Weight.from_float(zero),
        Int8ActivationWeight.from_float(zero),
        Int4Weight.from_float(zero, 2),
    ):
        np.testing.assert_array_equal(stored.read(), zero)
        assert not np.asarray(stored.product(np.ones((1, 4)), jnp.float32)).any()


@pytest.mark.parametrize(
    "store, most",
    # half a step of 1/127 of the largest, uniform: 0.4 % for normal weights; twice for
    # both sides; sixteen times coarser, of which groups of 16 win back a third
    [
        (Int8Weight.from_float, 0.012),
        (Int8ActivationWeight.from_float, 0.016),
        (lambda w: Int4Weight.from_float(w, 16), 0.1),
    ],
    ids=["w8", "w8a8", "w4"],
)
def test_products_are_near_those_of_the_floats(store, most):
    stored = jax.tree.map(lambda leaf: leaf[1], store(WEIGHT))
    found = stored.product(X, jnp.float32)
    exact = X.astype(np.float64) @ WEIGHT[1]
    assert 1e-4 < relative(found, exact) < most
    if not isinstance(stored, Int8ActivationWeight):
        np.testing.assert_allclose(
            found, X @ np.asarray(stored.read()), rtol=2e-4, atol=2e-4
        )


def test_w8a8_multiplies_integers():
    """What a backend with integer units gets: s8 x s8 -> s32 in the program's text."""
    stored = jax.tree.map(lambda leaf: leaf[1], Int8ActivationWeight.from_float(WEIGHT))
    text = jax.jit(lambda s, x: s.product(x, jnp.float32)).lower(stored, X).as_text()
    assert re.search(
        r"dot_general.*xi8>, tensor<64x24xi8>\) -> tensor<5x7x24xi32>", text
    )
    # one token's rounding does not depend on its neighbours
    one = stored.product(X[:1, :1], jnp.float32)
    np.testing.assert_array_equal(one[0, 0], stored.product(X, jnp.float32)[0, 0])


def test_what_is_skipped_and_what_is_once_an_image():
    tree = quantize_params(PARAMS, "w8a8", SKIP)
    kinds = {
        path: type(node)
        for path, node in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=is_weight_leaf
        )
    }
    kinds = {
        jax.tree_util.keystr(p, simple=True, separator="/"): k for p, k in kinds.items()
    }
    assert kinds["blocks/attn/qkv/kernel"] is Int8ActivationWeight
    assert kinds["blocks/mlp/fc2/kernel"] is Int8ActivationWeight
    assert kinds["blocks/adaLN/kernel"] is Int8Weight
    for name, kind in kinds.items():
        if name.startswith(("cond", "patch", "head")) or name.endswith("bias"):
            assert not issubclass(kind, Int8Weight), name
    spared = quantize_params(PARAMS, "w8", "(patch|cond|head)/.*|.*adaLN.*")
    assert not is_weight_leaf(spared["blocks"]["adaLN"]["kernel"])


@pytest.fixture(scope="module")
def outputs():
    """The network's output by form of its weights; "float" is the original."""
    x = RNG.standard_normal((4, *PARTS.shape)).astype(np.float32)
    at = (x, np.array([0.1, 0.4, 0.7, 1.0], np.float32), np.array([0, 2, 4, 5]))
    plain = quick_jit(lambda params: apply_model(PARTS.model, params, *at))
    found = {"float": plain(PARAMS)}
    for word in ("w8", "w8a8", "w4g8"):
        tree = quantize_params(PARAMS, word, SKIP)
        found[word] = quick_jit(lambda params: apply_model(PARTS.model, params, *at))(
            tree
        )
        found[f"{word} read"] = plain(materialize(tree))
    return found


def test_a_network_runs_on_them_layer_by_layer(outputs):
    """The same as with the weights read back into floats, but for w8a8's tokens."""
    for word, most in (("w8", 2e-5), ("w4g8", 2e-5), ("w8a8", 0.05)):
        assert relative(outputs[word], outputs[f"{word} read"]) < most
    for word, most in (("w8", 0.02), ("w8a8", 0.05), ("w4g8", 0.3)):
        assert 1e-4 < relative(outputs[word], outputs["float"]) < most, word


def test_shapes_of_a_saved_step_are_known_without_its_floats():
    like = jax.eval_shape(lambda: PARAMS)
    form = {"quantized": {"form": "w4g8", "skip": SKIP}}
    tree = quantize_params(PARAMS, "w4g8", SKIP)
    found = quantized_shapes(like, form)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    told = lambda tree: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)]
    assert told(found) == told(tree)
    assert quantized_shapes(like, {}) is like


def test_xl_takes_a_fourth():
    """In bytes, from shapes alone; only embedders, ends and biases stay floats."""
    from sit_jax.recipes import dit
    from sit_jax.training.state import init_params

    parts = build_experiment(dit())
    like = jax.eval_shape(
        lambda k: init_params(parts.model, parts.shape, k), jax.random.key(0)
    )
    total = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    sizes = {
        word: total(quantized_shapes(like, {"quantized": {"form": word, "skip": SKIP}}))
        for word in ("w8", "w4")
    }
    assert total(like) == 4 * 674_834_720
    assert sizes["w8"] / 1e9 == pytest.approx(0.69, abs=0.01)
    assert sizes["w4"] / 1e9 == pytest.approx(0.49, abs=0.01)


def test_one_float_leaf_at_a_time_gives_the_same():
    flat = [("a/kernel", WEIGHT), ("b/bias", WEIGHT[0, 0])]
    tree, rows = quantize_stream(iter(flat), "w8", SKIP)
    np.testing.assert_array_equal(
        tree["a"]["kernel"].codes, Int8Weight.from_float(WEIGHT).codes
    )
    (path, before, after, error), (_, same, still, none) = rows
    assert (path, before, same, still, none) == ("a/kernel", WEIGHT.nbytes, 96, 96, 0)
    assert after == WEIGHT.size + 3 * 24 * 4 == tree_bytes(tree["a"])
    assert error == pytest.approx(
        relative(Int8Weight.from_float(WEIGHT).read(), WEIGHT), rel=1e-4
    )


@pytest.mark.parametrize(
    "word, skip, said",
    [
        ("int8", SKIP, "'int8' is no form of weights: w8, w8a8, w4 or w4gN"),
        ("w4g0", SKIP, "'w4g0' is no form"),
        ("w8", "(", r"'\(' is no regular expression"),
        ("w8", ".*", "spares every weight: nothing becomes w8"),
        ("w4", SKIP, "has 16 inputs, which do not divide into groups of 128"),
        ("w4g3", SKIP, "do not divide into groups of 3"),
    ],
)
def test_impossible_forms_are_refused(word, skip, said):
    with pytest.raises(UserError, match=said):
        quantize_params(PARAMS, word, skip)


def test_a_weight_that_is_not_finite_is_named():
    bad = jax.tree.map(np.array, PARAMS)
    bad["blocks"]["mlp"]["fc1"]["kernel"][0, 0, 0] = np.inf
    with pytest.raises(
        UserError, match="blocks/mlp/fc1/kernel has values that are not"
    ):
        quantize_params(bad, "w8", SKIP)
