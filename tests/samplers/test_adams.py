"""Adams' method against torchdiffeq's figures and its order."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.samplers import once, solved

from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.paths import expand_dims_like
from sit_jax.samplers.fixed_ode import Adams, FixedStepODE, euler

# torchdiffeq 0.2.5 on dx/dt = x + t from x(0) = 1, ten steps to 1: x(1), evaluations
ADAMS = {
    "explicit": (Adams(10), 3.4364307, 16),
    "implicit": (Adams(10, implicit=True), 3.4365571, 24),
}


@pytest.mark.parametrize("name", ADAMS)
def test_adams_is_torchdiffeqs(name):
    sampler, value, evaluations = ADAMS[name]
    error, stats = solved(sampler)
    exact = 2 * np.e - 2
    # rounding over ten steps
    np.testing.assert_allclose(error, abs(value - exact) / exact, atol=1e-6)
    assert stats["evaluations"] == evaluations


@pytest.mark.parametrize("implicit", [False, True], ids=["explicit", "implicit"])
def test_adams_rises_in_order(implicit):
    """Eleven known slopes are exact for polynomials that four are not exact for."""
    net = lambda x, t: jnp.broadcast_to(8 * expand_dims_like(t, x) ** 7, x.shape)
    start = jnp.zeros((1, 1, 1, 1))
    run = once(lambda z: Adams(24, implicit)(net, Interpolant(), z).data)
    assert abs(float(run(start)[0, 0, 0, 0]) - 1) < 1e-5
    one = once(lambda z: FixedStepODE(euler, 24)(net, Interpolant(), z).data)
    assert abs(float(one(start)[0, 0, 0, 0]) - 1) > 0.1
