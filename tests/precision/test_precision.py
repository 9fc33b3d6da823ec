"""The words of precision.py in programs for CPU, GPU and TPU, read as text."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import SMALL, equations, noisy, quick_jit
from jax import export

from sit_jax.errors import UserError
from sit_jax.models.dit import DiT, SiT
from sit_jax.precision.policy import (
    BF16,
    EXACT,
    FAST,
    PRECISIONS,
    get_precision,
    with_compute_dtype,
    with_precision,
)

PRODUCTS = ("dot_general", "conv_general_dilated")
ONE_PASS = "bf16 bf16 f32 in 1"
# What a program says of float32 products. XLA's default in a convolution is what a TPU
# calls one pass, and is printed as nothing.
HIGHEST = ("HIGHEST", "HIGHEST")
SAID = {
    **{("exact", platform): HIGHEST for platform in ("cpu", "cuda", "tpu")},
    ("fast", "cpu"): HIGHEST,
    ("fast", "cuda"): ("HIGH", "HIGH"),
    ("fast", "tpu"): (ONE_PASS, "DEFAULT"),
    **{("bf16", platform): HIGHEST for platform in ("cpu", "cuda", "tpu")},
}
# Dots of a DiT: time in and out, head's adaLN and out; in the blocks adaLN, qkv,
# attention's values, proj, fc1, fc2, and apart from them attention's scores: of
# bfloat16 jax.nn takes these by an algorithm of its own, which means the same.
OUTER, INNER = 4, 6


def said(fn, platform, *args):
    """-> [(product, type of its operands, precision or algorithm)] of fn's program."""
    text = export.export(jax.jit(fn), platforms=[platform])(*args).mlir_module()
    return [_said(line) for line in text.splitlines() if _PRODUCT.search(line)]


_PRODUCT = re.compile(r"stablehlo\.(dot_general|convolution|dot)\b")
_ALGORITHM = re.compile(
    r"lhs_precision_type = (\w+), rhs_precision_type = (\w+), accumulation_type = (\w+)"
    r".*num_primitive_operations = (\d)"
)


def _said(line):
    types = set(re.findall(r"tensor<(?:\d+x)*(\w+)>", line.split(" -> ")[0]))
    words = set(re.findall(r"\b(HIGHEST|HIGH|DEFAULT)\b", line))
    if found := _ALGORITHM.search(line):
        words.add("{} {} {} in {}".format(*found.groups()))
    return (
        _PRODUCT.search(line)[1],
        "/".join(sorted(types)),
        "/".join(sorted(words)) or "DEFAULT",
    )


def dit(precision):
    model, (params, *inputs) = with_compute_dtype(precision, DiT(**SMALL)), dit_inputs()
    return lambda p, *rest: model.apply({"params": p}, *rest), (params, *inputs)


@functools.cache
def dit_inputs():
    """Shapes only: nothing is computed."""
    x = jax.ShapeDtypeStruct((2, 8, 8, 4), jnp.float32)
    t = jax.ShapeDtypeStruct((2,), jnp.float32)
    y = jax.ShapeDtypeStruct((2,), jnp.int32)
    params = jax.eval_shape(DiT(**SMALL).init, jax.random.key(0), x, t, y)["params"]
    return params, x, t, y


@pytest.mark.parametrize("word, platform", SAID)
def test_every_product_of_a_dit_says_it(word, platform):
    precision, (dot, convolution) = PRECISIONS[word], SAID[word, platform]
    net, inputs = dit(precision)
    low = {"float32": "f32", "bfloat16": "bf16"}[precision.dtype]
    # what is not reached shows, for it says this instead
    ambient = "bfloat16" if "HIGH" in dot else "highest"
    with jax.default_matmul_precision(ambient):
        found = said(with_precision(precision, net, platform), platform, *inputs)
    assert sorted(found) == sorted(
        [("dot_general", "f32", dot)] * OUTER
        + [("dot_general", low, dot)] * INNER
        + [("dot_general", low, ONE_PASS if low == "bf16" else dot)]
        + [("convolution", low, convolution)]
    )


def conv(image, kernel, **options):
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        image, kernel, (2, 2), "VALID", dimension_numbers=layout, **options
    )


CONV = (jnp.ones((1, 8, 8, 4)), jnp.ones((2, 2, 4, 8)))
DOT = (jnp.ones((8, 4)), jnp.ones((4, 8)))


def test_a_layer_with_a_precision_of_its_own_is_seen():
    """Or the test above could not fail."""
    own = lambda a, b: jnp.dot(a, b, precision="high") + a @ b
    found = said(with_precision(EXACT, own), "tpu", *DOT)
    kinds = [("dot_general", "f32", "HIGH"), ("dot_general", "f32", "HIGHEST")]
    assert sorted(found) == kinds
    own = lambda x, k: conv(x, k, precision="highest")
    found = said(with_precision(FAST, own, "tpu"), "tpu", *CONV)
    assert found == [("convolution", "f32", "HIGHEST")]


def precisions(program):
    found = equations(jax.make_jaxpr(program[0])(*program[1:]).jaxpr)
    return {str(e.params["precision"]) for e in found if e.primitive.name in PRODUCTS}


def test_derivatives_inherit_it():
    net, (params, *inputs) = dit(EXACT)
    net = with_precision(EXACT, net)
    loss = lambda p, *rest: jnp.square(net(p, *rest)).mean()
    highest = str((jax.lax.Precision.HIGHEST,) * 2)
    assert precisions((jax.grad(loss), params, *inputs)) == {highest}
    push = lambda x, *rest: jax.jvp(lambda x: net(params_of(x), x, *rest), (x,), (x,))
    params_of = lambda _: jax.tree.map(lambda s: jnp.ones(s.shape), params)
    assert precisions((push, *inputs)) == {highest}


@pytest.mark.parametrize("word", PRECISIONS)
def test_it_is_this_backends_and_ends_with_the_call(word):
    jax.jit(with_precision(PRECISIONS[word], jnp.dot))(*DOT)
    assert jax.config.jax_default_matmul_precision is None
    highest = str((jax.lax.Precision.HIGHEST,) * 2)
    assert precisions((with_precision(PRECISIONS[word], jnp.dot), *DOT)) == {highest}


@functools.cache
def output(word):
    params, *inputs = noisy()
    net = lambda p, *rest: SiT(**SMALL).apply({"params": p}, *rest)
    net = net if word is None else with_precision(PRECISIONS[word], net)
    return quick_jit(net)(params, *inputs)


@pytest.mark.parametrize("word", ["exact", "fast"])
def test_a_cpu_has_one_way(word):
    """So that a word changes no number that was recorded on a CPU."""
    np.testing.assert_array_equal(output(word), output(None))


def test_the_model_computes_in_the_words_dtype():
    model = DiT(**SMALL, dtype="bfloat16")
    for precision in (EXACT, FAST):
        assert with_compute_dtype(precision, model) == DiT(**SMALL)
    assert with_compute_dtype(BF16, DiT(**SMALL)) == model


@dataclasses.dataclass
class Fixed:
    """A model that has no field dtype."""


def test_a_model_without_a_choice_is_taken_as_float32():
    fixed = Fixed()
    assert with_compute_dtype(EXACT, fixed) is fixed
    with pytest.raises(UserError, match="'bf16': Fixed .*exact or fast"):
        with_compute_dtype(BF16, fixed)


@pytest.mark.parametrize("capability", ["7.5", "8.0", "12.1", "gfx942"])
def test_bf16_needs_a_gpu_that_has_it(capability):
    gpu = SimpleNamespace(compute_capability=capability, device_kind="Tesla T4")
    if capability == "7.5":
        with pytest.raises(UserError, match="'bf16': Tesla T4 cannot .*exact or fast"):
            with_compute_dtype(BF16, DiT(), gpu)
    else:
        assert with_compute_dtype(BF16, DiT(), gpu).dtype == "bfloat16"
    assert with_compute_dtype(EXACT, DiT(), gpu) == DiT()


def test_words_are_found_and_others_refused():
    assert [get_precision(word) for word in PRECISIONS] == [EXACT, FAST, BF16]
    with pytest.raises(UserError, match="no precision 'high'.* exact, fast, bf16"):
        get_precision("high")


def test_other_platforms_are_refused():
    with pytest.raises(UserError, match="'exact' .*'metal'.* cpu, gpu or tpu"):
        with_precision(EXACT, jnp.dot, "metal")(*DOT)
