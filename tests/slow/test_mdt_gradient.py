"""The gradient of MDT's two passes against the recorded one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import (
    BOTH,
    FREQUENCIES,
    process,
    quick_jit,
    recorded_masks,
    recorded_model,
    recorded_params,
)
from helpers.recorded import arrays, case, nhwc, relative

from sit_jax.convert.rules import rules_for, to_torch
from sit_jax.models import layers


@functools.cache
def gradient(name):
    golden, model = arrays(name), recorded_model(name)
    data, noise = nhwc(golden["loss.x_start"]), nhwc(golden["loss.noise"])
    t, y = jnp.asarray(golden["loss.t"], jnp.int32), golden["loss.y"]

    def total(params):
        losses = []
        for inputs in ({}, recorded_masks(name)):
            net = functools.partial(model.apply, {"params": params}, y=y, **inputs)
            losses.append(process(name).losses(net, data, noise, t)["loss"].mean())
        return sum(losses)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "timestep_frequencies", lambda half, shift: FREQUENCIES)
        return quick_jit(jax.grad(total))(recorded_params(name))


@pytest.mark.parametrize("name", BOTH)
def test_the_gradient_of_the_sum_is_as_recorded(name):
    """At t = 0 torch's bound, and with it the variance's slope, is mostly rounding.

    It does not reach the last layer's rows of the noise. Elsewhere 0.04 and 0.22 were
    seen with the releases' formula of the bound too.
    """
    golden, ours = arrays(name), gradient(name)
    ours = to_torch(rules_for(recorded_model(name)), ours)
    last = "final_layer.linear.weight"
    of_noise = np.arange(32) % 8 < 4
    theirs = golden[f"grad.{last}"][of_noise]
    assert relative(ours[last][of_noise], theirs) < 2e-5
    named = [k for k in golden if k.startswith("grad.")]
    assert len(named) == 5
    for key in named:
        assert relative(ours[key.removeprefix("grad.")], golden[key]) < 0.25, key
    for key, (norm, _) in case(name)["grad_norms"].items():
        assert np.linalg.norm(ours[key]) == pytest.approx(norm, rel=0.2), key
