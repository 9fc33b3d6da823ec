"""Guidance: what is asked of the network, and what is made of its answers."""

from functools import partial

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


INTERVAL = GuidanceInterval(2.5, 0.2, 0.4)


def test_an_interval_guides_inside_and_is_plain_outside():
    guided = classifier_free_guidance(net, LABELS, 9, INTERVAL)
    np.testing.assert_allclose(guided(X, T), by_hand(2.5), atol=1e-6)
    np.testing.assert_array_equal(guided(X, T + 0.2), net(X, T + 0.2, LABELS))
    # each image by its own time, where they differ
    t = jnp.array([0.3, 0.9])
    np.testing.assert_allclose(guided(X, t)[0], by_hand(2.5)[0], atol=1e-6)
    np.testing.assert_allclose(guided(X, t)[1], net(X, t, LABELS)[1], rtol=1e-6)


def test_an_interval_of_a_diffusion_counts_from_its_noise():
    progress = lambda t: 1 - t / 999
    guided = classifier_free_guidance(net, LABELS, 9, INTERVAL, progress=progress)
    for step, is_guided in ((700, True), (300, False)):  # progress is 0.3 and 0.7
        t = jnp.full(2, step)
        difference = np.abs(guided(X, t) - net(X, t, LABELS)).max()
        assert (difference > 0.1) if is_guided else difference == 0


def test_outside_the_interval_the_null_half_is_not_computed():
    rows = []

    def counting(x, t, y):
        jax.debug.callback(lambda y: rows.append(len(y)), y)
        return net(x, t, y)

    run = jax.jit(classifier_free_guidance(counting, LABELS, 9, INTERVAL))
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
    scales = (1.5, GuidanceInterval(1.0, 0, 1), PowerCosine())
    assert not any(is_unguided(scale) for scale in scales)
    only = lambda x, t, y: net(x, t, y) if len(y) == 2 else 1 / 0
    np.testing.assert_array_equal(
        classifier_free_guidance(only, LABELS, 9, 1)(X, T), net(X, T, LABELS)
    )


@pytest.mark.parametrize(
    "make, message",
    [
        *(
            (partial(GuidanceInterval, 2.0, *ends), "guidance interval")
            for ends in ((0.5, 0.2), (-0.1, 0.5), (0.2, 1.1), (0.3, 0.3))
        ),
        (partial(GuidanceInterval, PowerCosine()), "finite number"),
        (partial(GuidanceInterval, float("nan")), "finite number"),
        (partial(PowerCosine, power=0.0), "power=0.0"),
        (partial(PowerCosine, power=float("nan")), "power=nan"),
        (partial(PowerCosine, scale=float("inf")), "scale=inf"),
        (partial(PowerCosine, steps=0), "steps=0"),
    ],
)
def test_impossible_scales_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
