"""Whether int8 reaches a TPU's integer units: what its own compiler makes of the forms.

It needs no TPU, but libtpu: pip install -r requirements-slow.txt
"""

import functools
import importlib.util

import hlo_tables
import jax
import jax.numpy as jnp
import pytest
from helpers.networks import shapes

from sit_jax.adapters.apply import apply_model
from sit_jax.adapters.quantize import SKIP, quantized_shapes
from sit_jax.models.dit import SiT
from sit_jax.planning import tpu_compile

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
MODEL = SiT(depth=2, width=256, heads=4, patch=2, classes=10)


@functools.cache
def text(word, chip, dtype):
    """The program of a forward pass of 8 images, optimized for a chip."""
    model = MODEL.clone(dtype=dtype)
    params = shapes(model)
    if word != "plain":
        params = quantized_shapes(params, {"quantized": {"form": word, "skip": SKIP}})
    at = (jnp.ones((8, 16, 16, 4)), jnp.ones(8), jnp.ones(8, jnp.int32))
    one = jax.sharding.SingleDeviceSharding(tpu_compile.get_tpu_devices(chip)[0])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
    run = jax.jit(lambda params, *at: apply_model(model, params, *at))
    lowered = run.lower(*jax.tree.map(place, (params, *at)))
    with tpu_compile.without_compilation_cache():
        return lowered.compile().as_text()


def count(program, *types):
    """How many products of these types are written down: left, right, result."""
    found = hlo_tables.read_products(program)
    return sum(n for each, n in found.items() if each[:3] == types)


CHIPS = ["v5e:2x2", "v6e:2x2"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chip", CHIPS)
def test_w8a8_is_a_product_of_integers_on_the_chip(chip, dtype):
    """qkv, proj, fc1 and fc2, once in the loop over the blocks: s8 x s8 -> s32."""
    assert count(text("w8a8", chip, dtype), "s8", "s8", "s32") == 4
    assert count(text("plain", chip, dtype), "s8", "s8", "s32") == 0


@pytest.mark.parametrize("chip", CHIPS)
def test_w8_is_read_as_int8_by_the_product_itself(chip):
    """So the floats of a layer are never written to memory; modulation included."""
    program = text("w8", chip, "bfloat16")
    assert count(program, "bf16", "s8", "bf16") == 5


@pytest.mark.parametrize("chip", CHIPS)
def test_w4_becomes_floats_a_layer_at_a_time(chip):
    program = text("w4", chip, "bfloat16")
    assert count(program, "bf16", "s8", "bf16") == 1  # the modulation, which is w8
    assert count(program, "bf16", "bf16", "bf16") == 6
    stacked = [line for line in program.splitlines() if "= bf16[2,2,128," in line]
    assert not stacked


def test_a_cpu_multiplies_the_integers_too():
    params = quantized_shapes(
        shapes(MODEL), {"quantized": {"form": "w8a8", "skip": SKIP}}
    )
    at = (jnp.ones((8, 16, 16, 4)), jnp.ones(8), jnp.ones(8, jnp.int32))
    run = jax.jit(lambda params, *at: apply_model(MODEL, params, *at))
    program = run.lower(params, *at).compile().as_text()
    assert count(program, "s8", "s8", "s32") == 4
