"""A masked pass that is compiled for several numbers of tokens is the same pass."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import equations, quick_jit, shapes

from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.rng import StepKeys
from sit_jax.errors import UserError
from sit_jax.models.flops import step_macs
from sit_jax.models.mdt import MDT, MDTv2, bucket_sizes
from sit_jax.training.objectives import StepInputs, make_passes, value_and_grad

SMALL = dict(depth=3, decoder=1, width=24, heads=3, patch=1, classes=5)
ONE, THREE = MDTv2(**SMALL), MDTv2(mask_buckets=3, **SMALL)
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
        (THREE, {"y": 1}),
        (MDT(mask_buckets=3), {"y": 1, "order": 2}),
    ):
        assert model.bucket_inputs(inputs, SHAPE) == (0, [inputs])


def test_every_size_has_the_gradient_of_the_largest():
    one, three = (quick_jit(partial(gradient, model)) for model in (ONE, THREE))
    sizes, met = bucket_sizes(MDTv2(mask_buckets=3), 64), set()
    for seed in range(8):
        key = jax.random.key(seed)
        ((exact, terms), kept), ((found, others), _) = one(key), three(key)
        met.add(int(np.searchsorted(sizes, kept)))
        for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(found), strict=True):
            # sums over tokens in another order
            np.testing.assert_allclose(b, a, rtol=0, atol=3e-6 * np.abs(a).max())
        for name, term in terms.items():
            assert float(others[name]) == pytest.approx(float(term), rel=2e-6)
    assert met == {0, 1, 2}


def test_a_smaller_size_is_less_work():
    traced = jax.make_jaxpr(partial(gradient, THREE))(jax.random.key(0)).jaxpr
    (branches,) = [
        eqn.params["branches"]
        for eqn in equations(traced)
        if eqn.primitive.name == "cond" and len(eqn.params["branches"]) == 3
    ]
    rows = [
        {
            v.aval.shape[1:2]
            for e in equations(b.jaxpr)
            for v in e.outvars
            if v.aval.shape[2:] == (24,)
        }
        for b in branches
    ]
    for size, found in zip((36, 40, 44), rows, strict=True):
        assert {n for n in (36, 40, 44) if (n,) in found} == {size}
    at = lambda sizes: step_macs(MDTv2(mask_buckets=sizes, **SMALL), SHAPE[1:])
    assert at(1) > at(3) > at(100)


def test_a_network_without_buckets_is_refused():
    model = MDTv2(mask_buckets=0, **SMALL)
    with pytest.raises(UserError, match="model.mask_buckets is 0: at least 1"):
        model.pass_inputs(jax.random.key(0), SHAPE)
