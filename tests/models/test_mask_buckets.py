"""A masked pass that is compiled for several numbers of tokens is the same pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import equations, quick_jit, shapes

from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.rng import StepKeys
from sit_jax.models.flops import step_macs
from sit_jax.models.mdt import MDT, MDTv2, bucket_sizes
from sit_jax.training.objectives import StepInputs, make_passes, value_and_grad

SMALL = dict(depth=3, decoder=1, width=24, heads=3, patch=1, classes=5)
ONE, TWO = MDTv2(**SMALL), MDTv2(mask_buckets=2, **SMALL)
SHAPE = (2, 8, 8, 4)  # 64 tokens, of which 32 to 44 are seen


def weights():
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.normal(0, 0.15, s.shape), jnp.float32)
    return jax.tree.map(draw, shapes(ONE, 8))


def gradient(model, key):
    """Returns gradient and terms of the masked pass, and how many tokens it sees."""
    keys = StepKeys.at(key, 0)
    data = jax.random.normal(keys.codec, SHAPE)
    passes = make_passes(model, keys, jnp.array([1, 4]), SHAPE, 0.1)
    passes = {"m_": passes["m_"]}  # the plain one has no mask
    process, t = GaussianDiffusion(), jnp.array([20, 700])
    inputs = StepInputs(data, t, None, passes)
    grads, terms, _ = value_and_grad(model, process, {}, weights(), inputs)
    return (grads, terms), passes["m_"].inputs["num_visible"][0]


def test_sizes_are_evenly_spaced_up_to_the_most():
    assert bucket_sizes(MDTv2(mask_buckets=1), 256) == [179]
    assert bucket_sizes(MDTv2(mask_buckets=4), 256) == [141, 154, 167, 179]
    assert bucket_sizes(MDTv2(mask_buckets=100), 16) == [9, 10, 11]  # not one twice
    assert bucket_sizes(MDTv2(mask_ratio_range=0.0, mask_buckets=4), 256) == [179]


def test_the_smallest_size_that_holds_all_seen_tokens_is_run():
    model = MDTv2(mask_buckets=4)
    sizes = bucket_sizes(model, 256)
    for kept in range(128, 180):
        inputs = {"num_visible": jnp.full(2, kept), "order": None}
        index, buckets = model.bucket_inputs(inputs, (2, 32, 32, 4))
        assert [bucket["bucket_size"] for bucket in buckets] == sizes
        size = sizes[int(index)]
        assert kept <= size and not any(kept <= s < size for s in sizes)


def test_a_pass_without_a_drawn_share_has_one_program():
    for model, inputs in (
        (TWO, {"y": 1}),
        (MDT(mask_buckets=3), {"y": 1, "order": 2}),
    ):
        assert model.bucket_inputs(inputs, SHAPE) == (0, [inputs])


@pytest.fixture(scope="module")
def traced():
    """The program with two sizes."""
    return quick_jit(partial(gradient, TWO)).trace(jax.random.key(0))


def test_every_size_has_the_gradient_of_the_largest(traced):
    one, two = quick_jit(partial(gradient, ONE)), traced.lower().compile()
    sizes, met = bucket_sizes(TWO, 64), set()
    for seed in range(6):
        key = jax.random.key(seed)
        ((exact, terms), kept), ((found, others), _) = one(key), two(key)
        met.add(int(np.searchsorted(sizes, kept)))
        for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(found), strict=True):
            # sums over tokens in another order
            np.testing.assert_allclose(b, a, rtol=0, atol=3e-6 * np.abs(a).max())
        for name, term in terms.items():
            assert float(others[name]) == pytest.approx(float(term), rel=2e-6)
    assert met == {0, 1}


def test_a_smaller_size_is_less_work(traced):
    sizes = bucket_sizes(TWO, 64)
    found = []  # the tokens in each branch of a choice between the sizes
    for eqn in equations(traced.jaxpr.jaxpr):
        for branch in eqn.params["branches"] if eqn.primitive.name == "cond" else ():
            shapes = [v.aval.shape for e in equations(branch.jaxpr) for v in e.outvars]
            found += [{s[1] for s in shapes if s[2:] == (24,)} & set(sizes)]
    found = [tokens for tokens in found if tokens]
    assert found[:2] == [{size} for size in sizes]
    assert all(len(tokens) == 1 for tokens in found)
    at = lambda sizes: step_macs(MDTv2(mask_buckets=sizes, **SMALL), SHAPE[1:])
    assert at(1) > at(2) > at(100)
