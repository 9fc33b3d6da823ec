"""What a TPU's own compiler makes of the words; it needs no TPU, but libtpu.

pip install --no-deps --target DIR libtpu==0.0.51  (150 MB, for jax 0.10.2), then
PYTHONPATH=DIR .venv/bin/python -m pytest tests/slow/test_tpu_precision.py -o addopts=-q
"""

import functools
import importlib.util
import os
import re

import jax
import jax.numpy as jnp
import pytest
from helpers.networks import SMALL, shapes
from jax.experimental import topologies
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from sit_jax.models.dit import DiT
from sit_jax.precision.policy import (
    BF16,
    EXACT,
    FAST,
    with_compute_dtype,
    with_precision,
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


@pytest.fixture(autouse=True)
def without_cache():
    """A program for a TPU can be stored in the cache, but not be read without one."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", before)
    reset_cache()


@functools.cache
def chip():
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # there is no metadata server to wait for
    described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    return jax.sharding.SingleDeviceSharding(described.devices[0])


def compiled(fn, *inputs):
    """-> the program that a v5e would run, as text."""
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip())
    return jax.jit(fn).lower(*jax.tree.map(place, inputs)).compile().as_text()


def products(text):
    """Dots are convolutions to a TPU; -> what is asked of each."""
    lines = [line for line in text.splitlines() if " convolution(" in line]
    asked = [re.search(r"operand_precision=\{(.*?)\}", line) for line in lines]
    return [found[1] if found else "one pass" for found in asked]


def cycles(text):
    """Those of the largest operation."""
    return max(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text))


def dit(precision):
    model = with_compute_dtype(precision, DiT(**SMALL | {"width": 240}))
    inputs = (jnp.ones((8, 16, 16, 4)), jnp.ones(8), jnp.ones(8, jnp.int32))
    apply = lambda params, *rest: model.apply({"params": params}, *rest)
    return compiled(with_precision(precision, apply, "tpu"), shapes(model), *inputs)


@pytest.mark.parametrize(
    "precision, asked",
    [(EXACT, "highest,highest"), (FAST, "one pass")],
    ids=["exact", "fast"],
)
def test_every_product_of_a_dit_is_compiled_as_asked(precision, asked):
    found = products(dit(precision))
    assert len(found) >= 8 and set(found) == {asked}


def test_bf16_reaches_the_chip_in_bfloat16():
    text = dit(BF16)
    results = re.findall(r"= (\w+)\[[^=]* convolution\(", text)
    assert results.count("bf16") >= 5
    # the timestep's and the head's products stay in float32
    assert results.count("f32") >= 2


def conv(image, kernel):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        image, kernel, (2, 2), "VALID", dimension_numbers=layout
    )


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


MATRICES = (shaped(1024, 1024),) * 2
IMAGES = (shaped(8, 32, 32, 128), shaped(2, 2, 128, 128))


def called(name, fn):
    return jax.default_matmul_precision(name)(fn)


def test_exact_is_six_passes_and_fast_is_one():
    """An algorithm that says six costs as many cycles as exact, and one as fast."""
    exact, fast = (
        cycles(compiled(with_precision(p, jnp.dot, "tpu"), *MATRICES))
        for p in (EXACT, FAST)
    )
    assert exact == cycles(compiled(called("BF16_BF16_F32_X6", jnp.dot), *MATRICES))
    assert fast == cycles(compiled(jnp.dot, *MATRICES))  # the TPU's default
    assert exact > 3 * fast  # the rest is reading, which they share


def test_convolutions_follow_the_words_and_no_algorithm():
    exact, fast = (
        compiled(with_precision(p, conv, "tpu"), *IMAGES) for p in (EXACT, FAST)
    )
    default = compiled(conv, *IMAGES)
    assert cycles(exact) > cycles(fast) == cycles(default)
    assert products(exact) == ["highest,highest"]
    assert products(compiled(called("BF16_BF16_F32_X6", conv), *IMAGES)) == ["one pass"]


@pytest.mark.parametrize("name", ["F32_F32_F32", "TF32_TF32_F32"])
def test_a_tpu_has_no_such_algorithm(name):
    """Why exact is not F32_F32_F32."""
    with pytest.raises(jax.errors.JaxRuntimeError, match="not supported"):
        compiled(called(name, jnp.dot), *MATRICES)


def test_exact_costs_nothing_where_operands_are_bfloat16():
    half = (shaped(1024, 1024, dtype=jnp.bfloat16),) * 2
    marked = compiled(with_precision(BF16, jnp.dot, "tpu"), *half)
    assert cycles(marked) == cycles(compiled(jnp.dot, *half))
