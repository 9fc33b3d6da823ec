"""Training of weights in another form: what is trained apart from what is frozen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.adapters import (
    EVERY,
    MODELS,
    SHAPE,
    TX,
    adapted,
    adapter,
    equal,
    first,
    inputs,
    relative,
    weights,
)
from helpers.networks import quick_jit

from sit_jax.adapters.apply import apply_model
from sit_jax.adapters.weights import (
    LoRAWeight,
    join,
    quantize_int8,
    replace_weights,
    split_trainable,
    with_dropout_keys,
)
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.models.codec import Pixels
from sit_jax.models.dit import SiT
from sit_jax.models.mdt import MDT
from sit_jax.training.state import TrainState
from sit_jax.training.step import make_train_step


def test_split_and_join_are_inverse():
    tree = adapted(dora=True)
    trained, frozen = split_trainable(tree)
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
    trained, frozen = split_trainable(tree)
    assert trained is tree and frozen == {} and join(trained, frozen) is tree


def test_an_adapter_over_another_trains_both():
    inner = adapter("a", np.ones((4, 5), np.float32))
    tree = {"w": adapter("bb", inner), "v": np.ones(3)}
    trained, frozen = split_trainable(tree)
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
            w.replace(base=quantize_int8(path, w.base))
            if isinstance(w, LoRAWeight)
            else quantize_int8(path, w)
        )
        tree = replace_weights(tree, pattern, bases)
    state = TrainState.create(jax.tree.map(jnp.asarray, tree), TX)
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((8, *SHAPE)).astype(np.float32)
    batch = {"latent": latent, "label": np.arange(8, dtype=np.int32) % 7}
    step = quick_jit(make_train_step(model, Interpolant(), TX, ema_decay=0.5))
    before = state
    for _ in range(2):
        state, metrics = step(state, Pixels(), batch, jax.random.key(0))
    assert np.isfinite(metrics["loss"]) and metrics["bad"] == -1
    assert equal(state.frozen_params, before.frozen_params)
    for part in (state.params, state.ema["ema"]):
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
    tree = replace_weights(weights(model), EVERY, partial(adapter, dropout=0.1))
    state = TrainState.create(jax.tree.map(jnp.asarray, tree), TX)
    process = Interpolant() if isinstance(model, SiT) else GaussianDiffusion()
    step = make_train_step(model, process, TX, microbatches=2)
    batch = {"latent": np.zeros((4, *SHAPE), np.float32), "label": np.zeros(4, int)}
    new, metrics = jax.eval_shape(step, state, Pixels(), batch, jax.random.key(0))
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert ("m_loss" in metrics) == isinstance(model, MDT)


def test_dropout_is_of_a_row_by_its_key_and_keeps_the_mean():
    model = MODELS[0]
    tree = adapted(dropout=0.25)
    keys = jax.random.split(jax.random.key(0), 4)
    stored = with_dropout_keys(tree, keys)["blocks"]["attn"]["qkv"]["kernel"]
    assert stored.dropout_keys.shape == (2, 4)  # layers, rows
    layer = first(stored)
    x = np.ones((4, 400, 16), np.float32)
    found = np.asarray(layer._drop(x))
    values, counts = np.unique(found.round(5), return_counts=True)
    np.testing.assert_allclose(values, [0, 1 / 0.75], rtol=1e-4)
    assert abs(counts[0] / found.size - 0.25) < 0.02
    assert not np.array_equal(found[0], found[1])
    other = jax.tree.map(lambda leaf: leaf[1], stored)
    assert not np.array_equal(found, other._drop(x))
    run = quick_jit(partial(apply_model, model.clone(classes=7)))
    x, t, y = inputs(4)
    both = run(with_dropout_keys(tree, keys), x, t, y)
    half = run(with_dropout_keys(tree, keys[2:]), x[2:], t[2:], y[2:])
    np.testing.assert_allclose(half, both[2:], rtol=1e-4, atol=1e-5)
    assert relative(both, run(tree, x, t, y)) > 1e-2


def test_with_lengths_all_that_training_adds_sees_the_dropped_input():
    """Written out for one matrix: gain - 1 times the base, gain times the adapter."""
    base = weights(MODELS[0])["blocks"]["attn"]["qkv"]["kernel"][0]
    node = adapter("kernel", base, dora=True, dropout=0.5)
    x = np.random.default_rng(2).standard_normal((3, 5, 16)).astype(np.float32)
    node = node.replace(dropout_keys=jax.random.split(jax.random.key(0), 3))
    kept = np.asarray(node._drop(np.ones_like(x)))
    assert set(np.unique(kept)) == {0.0, 2.0}
    dropped, update = kept * x, 0.5 * node.lora_a @ node.lora_b
    gain = node.magnitude / np.linalg.norm(base + update, axis=0)
    wanted = x @ base + dropped @ ((gain - 1) * base + gain * update)
    assert relative(node.product(x, jnp.float32), wanted) < 1e-6
    undropped = node.replace(dropout_keys=None)
    wanted = x @ (gain * (base + update))
    assert relative(undropped.product(x, jnp.float32), wanted) < 1e-6
