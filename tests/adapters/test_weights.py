"""Weights in another form: what they read as, and in a network."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.adapters import (
    EVERY,
    HIGHEST,
    MODELS,
    adapter,
    first,
    inputs,
    relative,
    weights,
)
from helpers.networks import quick_jit

from sit_jax.adapters.apply import apply_model
from sit_jax.adapters.weights import (
    ExtraRows,
    Int8Weight,
    match_matrices,
    materialize,
    merge_adapters,
    replace_weights,
)
from sit_jax.errors import UserError

EACH = [(model, dora) for model in MODELS for dora in (False, True)]
KEPT = [EACH[1]]  # a SiT with lengths; all when slow
EACH = [e if e in KEPT else pytest.param(*e, marks=pytest.mark.slow) for e in EACH]


@pytest.mark.parametrize(
    "model, dora",
    EACH,
    ids=lambda x: type(x).__name__ if hasattr(x, "depth") else str(x),
)
def test_a_network_computes_the_same_with_and_without_merging(model, dora):
    """Float32 products in another order; every layer but the patches is adapted."""
    stored = replace_weights(weights(model), EVERY, partial(adapter, dora=dora))
    run = quick_jit(partial(apply_model, model))
    unmerged, merged = run(stored, *inputs()), run(materialize(stored), *inputs())
    assert relative(unmerged, merged) < 3e-6
    assert relative(merged, run(weights(model), *inputs())) > 0.05


def test_an_adapter_of_zeros_changes_no_bit():
    model = MODELS[0]
    stored = replace_weights(weights(model), EVERY, partial(adapter, zero=True))
    run = quick_jit(partial(apply_model, model))
    plain = run(weights(model), *inputs())
    np.testing.assert_array_equal(run(stored, *inputs()), plain)
    np.testing.assert_array_equal(run(materialize(stored), *inputs()), plain)


def test_what_is_merged_can_be_taken_away_again():
    """Each way rounds once: 6e-8 of the larger of the two."""
    base = flatten_dict(weights(MODELS[0]), sep="/")["blocks/attn/qkv/kernel"]
    merged = adapter("w", base).read()
    away = adapter("w", merged, scale=-0.5).read()
    assert relative(away, base) < 2e-7 and relative(merged, base) > 0.1


def test_merging_leaves_no_product_to_the_platform():
    """A TPU's default would cut an adapter to 8 bits on its way into the weights."""
    base = flatten_dict(weights(MODELS[0]), sep="/")["blocks/attn/qkv/kernel"]
    for way in (merge_adapters, materialize):
        program = jax.make_jaxpr(way)(adapter("kernel", base, dora=True))
        found = [e.params for e in program.eqns if e.primitive.name == "dot_general"]
        assert len(found) == 2 and all(set(p["precision"]) == {HIGHEST} for p in found)


def test_int8_in_bfloat16_keeps_the_scale_of_its_channels():
    """Rounding it to 8 bits would make every weight of a channel 0.3 % off."""
    scale = np.float32([[1.00390625 / 127]])  # halfway between two of bfloat16
    stored = Int8Weight(np.full((4, 1), 127, np.int8), scale)
    found = stored.product(jnp.full((1, 4), 64.0), jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert float(found[0, 0]) == float(jnp.bfloat16(4 * 64 * 1.00390625))


def test_adapters_over_adapters_add_up():
    model, path = MODELS[0], "blocks/attn/qkv/kernel"
    base = flatten_dict(weights(model), sep="/")[path]
    one = adapter(path, base)
    two = adapter("other", one, rank=2, scale=-1.5)
    sum_of_both = base + 0.5 * one.lora_a @ one.lora_b - 1.5 * two.lora_a @ two.lora_b
    np.testing.assert_allclose(two.read(), sum_of_both, rtol=1e-5, atol=1e-6)
    x = np.ones((3, 16), np.float32)
    found = first(two).product(x, jnp.float32)
    np.testing.assert_allclose(found, x @ sum_of_both[0], rtol=1e-5, atol=1e-5)


def test_new_rows_stand_before_the_null_label():
    table = np.arange(12, dtype=np.float32).reshape(6, 2)
    grown = ExtraRows(table, np.full((2, 2), 50.0, np.float32))
    assert grown.shape == (8, 2)
    both = np.concatenate([table[:5], np.full((2, 2), 50.0), table[5:]])
    np.testing.assert_array_equal(grown.read(), both)
    np.testing.assert_array_equal(grown.rows(np.array([7, 0, 5])), both[[7, 0, 5]])


def test_a_pattern_meets_matrices_only():
    paths = list(flatten_dict(weights(MODELS[0]), sep="/"))
    found = match_matrices(".*", paths)
    assert "patch/kernel" not in found and "cond/label/embedding" in found
    assert not [path for path in found if path.endswith("bias")]
    both = {"blocks/attn/qkv/kernel", "blocks/attn/proj/kernel"}
    assert set(match_matrices("blocks/attn/.*", paths)) == both


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("blocks/atn/qkv/kernel", "matches no weight; nearest: blocks/attn/qkv/kernel"),
        ("blocks/(", "no regular expression"),
        ("patch/kernel", "'patch/kernel' matches no weight"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused(pattern, told):
    with pytest.raises(UserError, match=told):
        match_matrices(pattern, flatten_dict(weights(MODELS[0]), sep="/"))
