"""Samplers multiply beside the network too; no platform may cut those numbers short."""

import jax
import jax.numpy as jnp
import pytest
from helpers.networks import equations

from sit_jax.config import build
from sit_jax.diffusion.gaussian import GaussianDiffusion, fixed_small
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.samplers.adaptive_ode import AdaptiveODE
from sit_jax.samplers.registry import CONTROLS, SAMPLERS

CHAINS = ("ddpm", "ddim")
HIGHEST = jax.lax.Precision.HIGHEST


def program(name, sampler):
    """The sampler's program with a network that has no products."""
    process = (
        GaussianDiffusion(variance=fixed_small) if name in CHAINS else Interpolant()
    )
    draw = lambda i: jnp.zeros((2, 4, 4, 1))
    run = lambda x: sampler(lambda x, t: 0.5 * x, process, x, draw).data
    return jax.make_jaxpr(run)(jnp.zeros((2, 4, 4, 1))).jaxpr


ALL = {name: lambda make=make: build(make()) for name, make in SAMPLERS.items()}
ALL |= {
    word: lambda control=control: AdaptiveODE(control=control)
    for word, control in CONTROLS.items()
}


@pytest.mark.parametrize("name", sorted(ALL))
def test_no_product_is_left_to_the_platform(name):
    """By default a TPU rounds its operands to 8 bits, a GPU to 11."""
    for equation in equations(program(name, ALL[name]())):
        if equation.primitive.name == "dot_general":
            assert set(equation.params["precision"] or "?") == {HIGHEST}


def test_the_network_keeps_the_precision_that_it_is_given():
    def seen(word):
        net = lambda x, t: x @ jnp.eye(1)
        run = lambda x: AdaptiveODE()(net, Interpolant(), x).data
        with jax.default_matmul_precision(word):
            found = jax.make_jaxpr(run)(jnp.zeros((2, 4, 4, 1))).jaxpr
        dots = [e for e in equations(found) if e.primitive.name == "dot_general"]
        return {e.params["precision"] for e in dots if e.invars[1].aval.shape == (1, 1)}

    assert seen(None) == {None}
    assert seen("tensorfloat32") == {(jax.lax.Precision.HIGH,) * 2}
