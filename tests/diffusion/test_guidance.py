"""Guidance: what is asked of the network, and what is made of its answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.recorded import arrays, nchw, nhwc
from helpers.samplers import once, tiny

from sit_jax.diffusion.guidance import (
    GuidanceInterval,
    PowerCosine,
    classifier_free_guidance,
    guide_both_halves,
    is_unguided,
)
from sit_jax.errors import UserError

LABELS = jnp.array([1, 2])
X = jax.random.normal(jax.random.key(0), (2, 2, 2, 4))
T = jnp.array([0.3, 0.3])


def net(x, t, y):
    """An output that tells its label and input apart; the null label is 9."""
    return jnp.sin(x + y[:, None, None, None]) + t[:, None, None, None]


def by_hand(scale, channels=3):
    cond, free = net(X, T, LABELS), net(X, T, jnp.array([9, 9]))
    pushed = free + scale * (cond - free)
    return np.concatenate([pushed[..., :channels], cond[..., channels:]], -1)


@pytest.mark.parametrize("channels", [3, 4])
def test_a_number(channels):
    out = classifier_free_guidance(net, LABELS, 9, 2.5, channels)(X, T)
    np.testing.assert_allclose(out, by_hand(2.5, channels), rtol=1e-6)


def test_a_function_of_time():
    scale = PowerCosine(scale=3.0, power=2.0, steps=1)
    out = classifier_free_guidance(net, LABELS, 9, scale)(X, T)
    expected = by_hand(float(scale(T)[0]))
    np.testing.assert_allclose(out, expected, rtol=1e-5)


@pytest.mark.parametrize("strength", [1.5, 4.0])
def test_recorded_halves(strength):
    """forward_with_cfg's both halves, which an adaptive solver's error is made of."""
    g = arrays("sit_forward_a")
    model, params = tiny()
    apply = lambda *at: model.apply({"params": params}, *at)
    labels = jnp.asarray(g["cfg.y"][: len(g["cfg.y"]) // 2])
    both = guide_both_halves(apply, labels, 10, strength)
    out = once(both)(nhwc(g["cfg.x"]), jnp.asarray(g["cfg.t"]))
    theirs = g[f"cfg.out_{strength}"]
    # rounding of float32 in other orders, magnified by the scale
    np.testing.assert_allclose(nchw(out), theirs, atol=1e-5 * np.abs(theirs).max())


def test_an_interval_guides_inside_and_is_plain_outside():
    inside = classifier_free_guidance(net, LABELS, 9, GuidanceInterval(2.5, 0.2, 0.4))(
        X, T
    )
    np.testing.assert_allclose(inside, by_hand(2.5), atol=1e-6)
    outside = classifier_free_guidance(net, LABELS, 9, GuidanceInterval(2.5, 0.4, 0.8))(
        X, T
    )
    np.testing.assert_array_equal(outside, net(X, T, LABELS))
    # each image by its own time, where they differ
    t = jnp.array([0.3, 0.9])
    mixed = classifier_free_guidance(net, LABELS, 9, GuidanceInterval(2.5, 0.2, 0.4))(
        X, t
    )
    np.testing.assert_allclose(mixed[0], by_hand(2.5)[0], atol=1e-6)
    np.testing.assert_allclose(mixed[1], net(X, t, LABELS)[1], rtol=1e-6)


def test_an_interval_of_a_diffusion_counts_from_its_noise():
    progress = lambda t: 1 - t / 999
    scale = GuidanceInterval(2.5, 0.2, 0.4)
    out = classifier_free_guidance(net, LABELS, 9, scale, progress=progress)(
        X, jnp.array([700, 700])
    )
    cond = net(X, jnp.array([700, 700]), LABELS)
    assert np.abs(out[..., :3] - cond[..., :3]).max() > 0.1  # progress is 0.3
    out = classifier_free_guidance(net, LABELS, 9, scale, progress=progress)(
        X, jnp.array([300, 300])
    )
    np.testing.assert_array_equal(out, net(X, jnp.array([300, 300]), LABELS))


def test_outside_the_interval_the_null_half_is_not_computed():
    rows = []

    def counting(x, t, y):
        jax.debug.callback(lambda y: rows.append(len(y)), y)
        return net(x, t, y)

    run = jax.jit(
        classifier_free_guidance(counting, LABELS, 9, GuidanceInterval(2.5, 0.2, 0.4))
    )
    for t in (0.1, 0.3, 0.5):
        run(X, jnp.full(2, t))
    jax.effects_barrier()
    assert rows == [2, 4, 2]


def test_autoguidance_leads_away_from_the_worse_network():
    worse = lambda x, t, y: 0.5 * net(x, t, y)
    out = classifier_free_guidance(net, LABELS, 9, 2.0, 4, guiding_model=worse)(X, T)
    np.testing.assert_allclose(out, 1.5 * net(X, T, LABELS), rtol=1e-6)


def test_none_is_one_pass():
    assert is_unguided(1) and is_unguided(1.0)
    assert not (
        is_unguided(1.5)
        or is_unguided(GuidanceInterval(1.0, 0, 1))
        or is_unguided(PowerCosine())
    )
    only = lambda x, t, y: net(x, t, y) if len(y) == 2 else 1 / 0
    np.testing.assert_array_equal(
        classifier_free_guidance(only, LABELS, 9, 1)(X, T), net(X, T, LABELS)
    )


@pytest.mark.parametrize("ends", [(0.5, 0.2), (-0.1, 0.5), (0.2, 1.1), (0.3, 0.3)])
def test_impossible_intervals_are_refused(ends):
    with pytest.raises(UserError, match="guidance interval"):
        GuidanceInterval(2.0, *ends)


def test_an_interval_of_no_number_is_refused():
    with pytest.raises(UserError, match="finite number"):
        GuidanceInterval(PowerCosine(), 0.1, 0.2)
    with pytest.raises(UserError, match="finite number"):
        GuidanceInterval(float("nan"), 0.1, 0.2)
