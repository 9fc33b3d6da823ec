"""The product of training: jnp.dot, and its gradients, written in another order."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import SMALL, noisy, quick_jit
from helpers.recorded import relative

from sit_jax.adapters.apply import apply_model, apply_model_for_training
from sit_jax.models.attention_cpu import training_product
from sit_jax.models.dit import SiT

rng = np.random.default_rng(0)


def slopes(multiply, x, weight):
    loss = lambda *a: jnp.square(multiply(*a)).sum()
    return jax.grad(loss, argnums=(0, 1))(x, weight)


@pytest.mark.parametrize("shape", [(7, 3), (2, 5, 3), (2, 2, 5, 3)])
def test_it_is_jaxs_with_both_its_gradients(shape):
    x, weight = (rng.standard_normal(s, np.float32) for s in (shape, (3, 4)))
    assert (training_product(x, weight) == jnp.dot(x, weight)).all()
    of_x, of_weight = slopes(training_product, x, weight)
    assert of_weight.shape == weight.shape
    usual = slopes(jnp.dot, x, weight)
    assert relative(of_x, usual[0]) == 0
    assert relative(of_weight, usual[1]) < 1e-6  # sums of 20 in another order


def test_only_a_cpu_gets_the_other_product():
    x, weight = jnp.ones((2, 5, 3), jnp.bfloat16), jnp.ones((3, 4), jnp.bfloat16)

    def dots(multiply, platform):
        run = jax.jit(lambda *a: slopes(multiply, *a)).trace(x, weight)
        text = run.lower(lowering_platforms=(platform,)).as_text()
        return sorted(re.findall(r"dot_general.*?(contracting_dims.*)", text))

    assert dots(training_product, "tpu") == dots(jnp.dot, "tpu")
    assert dots(training_product, "cuda") == dots(jnp.dot, "cuda")
    assert dots(training_product, "cpu") != dots(jnp.dot, "cpu")


def test_its_gradient_inherits_the_precision():
    x, weight = jnp.ones((5, 3)), jnp.ones((3, 4))

    def exactly(*a):
        with jax.default_matmul_precision("highest"):
            return training_product(*a)

    run = jax.jit(lambda *a: slopes(exactly, *a)).trace(x, weight)
    for platform in ("cpu", "tpu"):
        text = run.lower(lowering_platforms=(platform,)).as_text()
        found = re.findall(r"precision = \[(\w+), (\w+)\]", text)
        assert found == [("HIGHEST", "HIGHEST")] * 3


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_training_multiplies_by_it_and_finds_the_same(remat):
    params, *given = noisy()

    def found(how):
        net = lambda params: how(SiT(**SMALL, remat=remat), params, *given)
        loss = lambda params: jnp.square(net(params)).sum()
        run = quick_jit(lambda params: (net(params), jax.grad(loss)(params)))
        return run(params), run.lower(params).as_text()

    (usual, slopes), as_before = found(apply_model)
    (out, others), text = found(apply_model_for_training)
    assert (out == usual).all()
    for each, other in zip(*map(jax.tree.leaves, (slopes, others)), strict=True):
        assert relative(other, each) < 3e-6
    # in the loop, the gradients of qkv, proj, fc1 and fc2 by what came in
    turned = r"dot_general.*contracting_dims = \[0, 1\] x \[0, 1\]"
    swapped = lambda text: len(re.findall(turned + r".*\(tensor<2x16x24xf32>, ", text))
    assert swapped(text) != swapped(as_before)
