"""Weights in another form: what they read as, in a network, apart and together."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from networks import quick_jit

from sit_jax.codec import Pixels
from sit_jax.diffusion import Diffusion
from sit_jax.errors import UserError
from sit_jax.interpolant import Interpolant
from sit_jax.models.applied import apply
from sit_jax.models.dit import DiT, SiT
from sit_jax.models.mdt import MDT, MDTv2
from sit_jax.stored import (
    Adapted,
    Grown,
    Quantized,
    dropping,
    join,
    matched,
    merged,
    quantize,
    read,
    replace,
    split,
)
from sit_jax.training import fresh_state, init_params, make_train_step

SHAPE, SIZE = (4, 4, 2), dict(width=16, heads=2, classes=5)
MODELS = [SiT(depth=2, **SIZE), DiT(depth=2, **SIZE), MDT(depth=4, **SIZE)]
MODELS += [MDTv2(depth=6, **SIZE)]
EVERY = ".*"
HIGHEST = jax.lax.Precision.HIGHEST
TX = optax.adam(1e-2)


@cache
def weights(model):
    """Random ones everywhere: as drawn, most gates would be zero."""
    like = jax.eval_shape(partial(init_params, model, SHAPE), jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda x: 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    return jax.tree.map(draw, like)


def adapter(path, weight, rank=3, zero=False, dora=False, **settings):
    rng = np.random.default_rng(len(path))
    draw = lambda *shape: 0.3 * rng.standard_normal(shape).astype(np.float32)
    *lead, fan_in, fan_out = weight.shape
    up = draw(*lead, rank, fan_out) * (not zero)
    magnitude = 1 + draw(*lead, fan_out) if dora and "kernel" in path else None
    down = draw(*lead, fan_in, rank)
    return Adapted(weight, down, up, magnitude, **{"scale": 0.5, **settings})


def inputs(n=2):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((n, *SHAPE)).astype(np.float32)
    return x, np.linspace(0.2, 0.9, n, dtype=np.float32), np.arange(n) % 6


def relative(ours, theirs):
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def first(stored):
    """Its first layer."""
    return jax.tree.map(lambda leaf: leaf[0], stored)


def equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


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
    stored = replace(weights(model), EVERY, partial(adapter, dora=dora))
    run = quick_jit(partial(apply, model))
    unmerged, merged = run(stored, *inputs()), run(read(stored), *inputs())
    assert relative(unmerged, merged) < 3e-6
    assert relative(merged, run(weights(model), *inputs())) > 0.05


def test_an_adapter_of_zeros_changes_no_bit():
    model = MODELS[0]
    stored = replace(weights(model), EVERY, partial(adapter, zero=True))
    run = quick_jit(partial(apply, model))
    plain = run(weights(model), *inputs())
    np.testing.assert_array_equal(run(stored, *inputs()), plain)
    np.testing.assert_array_equal(run(read(stored), *inputs()), plain)


def test_what_is_merged_can_be_taken_away_again():
    """Each way rounds once: 6e-8 of the larger of the two."""
    base = flatten_dict(weights(MODELS[0]), sep="/")["blocks/attn/qkv/kernel"]
    merged = adapter("w", base).read()
    away = adapter("w", merged, scale=-0.5).read()
    assert relative(away, base) < 2e-7 and relative(merged, base) > 0.1


def test_merging_leaves_no_product_to_the_platform():
    """A TPU's default would cut an adapter to 8 bits on its way into the weights."""
    base = flatten_dict(weights(MODELS[0]), sep="/")["blocks/attn/qkv/kernel"]
    for way in (merged, read):
        program = jax.make_jaxpr(way)(adapter("kernel", base, dora=True))
        found = [e.params for e in program.eqns if e.primitive.name == "dot_general"]
        assert len(found) == 2 and all(set(p["precision"]) == {HIGHEST} for p in found)


def test_int8_in_bfloat16_keeps_the_scale_of_its_channels():
    """Rounding it to 8 bits would make every weight of a channel 0.3 % off."""
    scale = np.float32([[1.00390625 / 127]])  # halfway between two of bfloat16
    stored = Quantized(np.full((4, 1), 127, np.int8), scale)
    found = stored.product(jnp.full((1, 4), 64.0), jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    assert float(found[0, 0]) == float(jnp.bfloat16(4 * 64 * 1.00390625))


def test_adapters_over_adapters_add_up():
    model, path = MODELS[0], "blocks/attn/qkv/kernel"
    base = flatten_dict(weights(model), sep="/")[path]
    one = adapter(path, base)
    two = adapter("other", one, rank=2, scale=-1.5)
    sum_of_both = base + 0.5 * one.down @ one.up - 1.5 * two.down @ two.up
    np.testing.assert_allclose(two.read(), sum_of_both, rtol=1e-5, atol=1e-6)
    x = np.ones((3, 16), np.float32)
    found = first(two).product(x, jnp.float32)
    np.testing.assert_allclose(found, x @ sum_of_both[0], rtol=1e-5, atol=1e-5)


def test_int8_is_within_half_a_step_of_each_channel():
    weight = weights(MODELS[0])["blocks"]["mlp"]["fc1"]["kernel"].copy()
    weight[:, :, 3] = 0
    stored = quantize("w", weight)
    assert stored.codes.dtype == jnp.int8 and stored.scale.shape == (2, 1, 64)
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(stored.read() - weight) <= 0.501 * step)
    assert relative(stored.read(), weight) > 1e-4
    x = np.ones((2, 3, 16), np.float32)
    found = first(stored).product(x, jnp.float32)
    np.testing.assert_allclose(found, x @ stored.read()[0], rtol=1e-5, atol=1e-5)


def test_new_rows_stand_before_the_null_label():
    table = np.arange(12, dtype=np.float32).reshape(6, 2)
    grown = Grown(table, np.full((2, 2), 50.0, np.float32))
    assert grown.shape == (8, 2)
    both = np.concatenate([table[:5], np.full((2, 2), 50.0), table[5:]])
    np.testing.assert_array_equal(grown.read(), both)
    np.testing.assert_array_equal(grown.rows(np.array([7, 0, 5])), both[[7, 0, 5]])


# What is trained and what is not


def adapted(model=MODELS[0], pattern=r"blocks/(attn/qkv|mlp/fc1)/kernel", **settings):
    tree = replace(weights(model), pattern, partial(adapter, **settings))
    more = np.zeros((2, 16), np.float32)
    return replace(tree, "cond/label/embedding", lambda _, w: Grown(w, more))


def test_split_and_join_are_inverse():
    tree = adapted(dora=True)
    trained, frozen = split(tree)
    names = {"/".join(path) for path in flatten_dict(trained)}
    layers = ("blocks/attn/qkv/kernel", "blocks/mlp/fc1/kernel")
    assert names == {*layers, "cond/label/embedding"}
    own = [leaf.shape for leaf in jax.tree.leaves(trained)]
    assert sorted(own)[:2] == [(2, 3, 48), (2, 3, 64)] and len(own) == 7
    assert len(jax.tree.leaves(frozen)) == len(jax.tree.leaves(weights(MODELS[0])))
    again = join(trained, frozen)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    assert equal(again, tree)


def test_without_adapters_all_is_trained():
    tree = weights(MODELS[0])
    trained, frozen = split(tree)
    assert trained is tree and frozen == {} and join(trained, frozen) is tree


def test_an_adapter_over_another_trains_both():
    inner = adapter("a", np.ones((4, 5), np.float32))
    tree = {"w": adapter("bb", inner), "v": np.ones(3)}
    trained, frozen = split(tree)
    assert len(jax.tree.leaves(trained)) == 4 and len(jax.tree.leaves(frozen)) == 2
    assert equal(join(trained, frozen), tree)


@pytest.mark.parametrize(
    "kind", [pytest.param("float", marks=pytest.mark.slow), "int8"]
)
def test_a_step_moves_the_adapters_alone(kind):
    """QLoRA: int8 has no gradient, and none is asked of it."""
    model, tree = MODELS[0].clone(classes=7), adapted(dropout=0.2)
    if kind == "int8":
        pattern = "blocks/.*"
        bases = lambda path, w: (
            w.replace(base=quantize(path, w.base))
            if isinstance(w, Adapted)
            else quantize(path, w)
        )
        tree = replace(tree, pattern, bases)
    state = fresh_state(TX, jax.tree.map(jnp.asarray, tree))
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((8, *SHAPE)).astype(np.float32)
    batch = {"latent": latent, "label": np.arange(8, dtype=np.int32) % 7}
    step = quick_jit(make_train_step(model, Interpolant(), TX, decay=0.5))
    before = state
    for _ in range(2):
        state, metrics = step(state, Pixels(), batch, jax.random.key(0))
    assert np.isfinite(metrics["loss"]) and metrics["bad"] == -1
    assert equal(state.frozen, before.frozen)
    for part in (state.params, state.ema):
        moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), part, before.params)
        assert all(jax.tree.leaves(moved))
    sizes = [x.size for x in jax.tree.leaves(state.params)]
    adam = sum(x.size for x in jax.tree.leaves(state.opt_state)) - 1
    assert adam == 2 * sum(sizes)


SLOWER = [pytest.param(MODELS[i], marks=pytest.mark.slow) for i in (0, 2, 3)]


@pytest.mark.parametrize(
    "model", [MODELS[1], *SLOWER], ids=lambda model: type(model).__name__
)
def test_every_network_takes_a_step_of_adapters(model):
    """Traced, not run: MDT's second pass has fewer tokens and other keys."""
    tree = replace(weights(model), EVERY, partial(adapter, dropout=0.1))
    state = fresh_state(TX, jax.tree.map(jnp.asarray, tree))
    process = Interpolant() if isinstance(model, SiT) else Diffusion()
    step = make_train_step(model, process, TX, accumulate=2)
    batch = {"latent": np.zeros((4, *SHAPE), np.float32), "label": np.zeros(4, int)}
    new, metrics = jax.eval_shape(step, state, Pixels(), batch, jax.random.key(0))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert ("m_loss" in metrics) == isinstance(model, MDT)


# Dropout


def test_dropout_is_of_a_row_by_its_key_and_keeps_the_mean():
    model = MODELS[0]
    tree = adapted(dropout=0.25)
    keys = jax.random.split(jax.random.key(0), 4)
    stored = dropping(tree, keys)["blocks"]["attn"]["qkv"]["kernel"]
    assert stored.keys.shape == (2, 4)  # layers, rows
    layer = first(stored)
    x = np.ones((4, 400, 16), np.float32)
    found = np.asarray(layer._dropped(x))
    values, counts = np.unique(found.round(5), return_counts=True)
    np.testing.assert_allclose(values, [0, 1 / 0.75], rtol=1e-4)
    assert abs(counts[0] / found.size - 0.25) < 0.02
    assert not np.array_equal(found[0], found[1])
    other = jax.tree.map(lambda leaf: leaf[1], stored)
    assert not np.array_equal(found, other._dropped(x))
    run = quick_jit(partial(apply, model.clone(classes=7)))
    x, t, y = inputs(4)
    both = run(dropping(tree, keys), x, t, y)
    half = run(dropping(tree, keys[2:]), x[2:], t[2:], y[2:])
    np.testing.assert_allclose(half, both[2:], rtol=1e-4, atol=1e-5)
    assert relative(both, run(tree, x, t, y)) > 1e-2


def test_with_lengths_all_that_training_adds_sees_the_dropped_input():
    """Written out for one matrix: gain - 1 times the base, gain times the adapter."""
    base = weights(MODELS[0])["blocks"]["attn"]["qkv"]["kernel"][0]
    node = adapter("kernel", base, dora=True, dropout=0.5)
    x = np.random.default_rng(2).standard_normal((3, 5, 16)).astype(np.float32)
    node = node.replace(keys=jax.random.split(jax.random.key(0), 3))
    kept = np.asarray(node._dropped(np.ones_like(x)))
    assert set(np.unique(kept)) == {0.0, 2.0}
    dropped, update = kept * x, 0.5 * node.down @ node.up
    gain = node.magnitude / np.linalg.norm(base + update, axis=0)
    wanted = x @ base + dropped @ ((gain - 1) * base + gain * update)
    assert relative(node.product(x, jnp.float32), wanted) < 1e-6
    undropped = node.replace(keys=None)
    wanted = x @ (gain * (base + update))
    assert relative(undropped.product(x, jnp.float32), wanted) < 1e-6


# What is meant by a pattern


def test_a_pattern_meets_matrices_only():
    paths = list(flatten_dict(weights(MODELS[0]), sep="/"))
    found = matched(".*", paths)
    assert "patch/kernel" not in found and "cond/label/embedding" in found
    assert not [path for path in found if path.endswith("bias")]
    both = {"blocks/attn/qkv/kernel", "blocks/attn/proj/kernel"}
    assert set(matched("blocks/attn/.*", paths)) == both


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
        matched(pattern, flatten_dict(weights(MODELS[0]), sep="/"))


def test_a_weight_that_is_not_finite_is_not_quantized():
    with pytest.raises(UserError, match="w has values that are not finite"):
        quantize("w", np.array([[1.0, np.nan]]))
    assert isinstance(quantize("w", np.zeros((2, 2), np.float32)), Quantized)
