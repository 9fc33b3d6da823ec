"""The probe, against products that are rounded as it should find."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from sit_jax.precision.emulation import emulate
from sit_jax.precision.policy import BF16, EXACT, FAST, with_precision
from sit_jax.precision.probe import (
    describe_precision,
    measure_mantissa_bits,
    precision_warning,
)


def found(default, model, convolution):
    return {"default dot": default, "model dot": model, "convolution": convolution}


def rounded(x, bits):
    return jax.lax.reduce_precision(x, 8, bits - 1)


def cut(x, bits):
    """Towards zero, as some hardware reads TF32."""
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    kept = raw & jnp.uint32((1 << 32) - (1 << (24 - bits)))
    return jax.lax.bitcast_convert_type(kept, jnp.float32)


def in_two(fn):
    """float32 as the sum of two bfloat16, which is three passes."""

    def run(a, b):
        (a, a_rest), (b, b_rest) = ((rounded(x, 8), x - rounded(x, 8)) for x in (a, b))
        rest = fn(a, rounded(b_rest, 8)) + fn(rounded(a_rest, 8), b)
        return fn(a, b) + rest

    return run


# what is done to a product, and the bits that are left
DONE = {
    "nothing": (lambda fn: fn, 24),
    "rounded to 8": (partial(emulate, mantissa_bits=8), 8),
    "rounded to 11": (partial(emulate, mantissa_bits=11), 11),
    "left rounded": (lambda fn: lambda a, b: fn(rounded(a, 8), b), 8),
    "right rounded": (lambda fn: lambda a, b: fn(a, rounded(b, 23)), 23),
    "cut to 11": (lambda fn: lambda a, b: fn(cut(a, 11), cut(b, 11)), 11),
    "in two": (in_two, 17),  # 8 each, and the second one's sign
    "result in bfloat16": (lambda fn: lambda a, b: rounded(fn(a, b), 8), 24),
    "nothing left": (lambda fn: lambda a, b: 0 * fn(a, b), 1),
}


@pytest.mark.parametrize("done", DONE)
def test_it_finds_the_bits_of_operands(done):
    apply, bits = DONE[done]
    assert measure_mantissa_bits(apply) == found(24, bits, bits)


def test_a_cpu_keeps_what_the_words_promise():
    assert measure_mantissa_bits(partial(with_precision, EXACT)) == found(24, 24, 24)
    half = measure_mantissa_bits(partial(with_precision, BF16), BF16.dtype)
    assert half == found(24, 8, 8)
    assert precision_warning(EXACT, found(24, 24, 24)) is None
    assert precision_warning(BF16, half) is None


def test_the_line():
    measured = found(8, 24, 24)
    assert describe_precision(EXACT, measured) == (
        "precision: exact; mantissa bits of a default dot 8, the model's 24, "
        "convolution 24 (cpu)"
    )
    assert describe_precision(FAST, measured, "tpu-default").startswith(
        "precision: fast, emulating tpu-default; mantissa"
    )


CPU = SimpleNamespace(platform="cpu", device_kind="cpu")
GPU = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5e")


@pytest.mark.parametrize(
    "precision, device, bits, emulation",
    [
        (EXACT, GPU, (24, 24), None),
        (FAST, CPU, (24, 24), None),
        (FAST, GPU, (11, 11), None),
        (FAST, GPU, (11, 24), None),  # cuDNN may know a quicker one than TF32
        (FAST, TPU, (8, 8), None),
        (BF16, TPU, (8, 8), None),
        (EXACT, CPU, (8, 8), 8),
        (FAST, TPU, (11, 11), 11),
        (BF16, CPU, (8, 8), 11),
    ],
)
def test_what_is_promised_passes(precision, device, bits, emulation):
    assert precision_warning(precision, found(24, *bits), emulation, device) is None


@pytest.mark.parametrize(
    "precision, device, bits, emulation, meant",
    [
        (EXACT, TPU, (24, 8), None, "24 bits of mantissa on TPU v5e"),
        (EXACT, GPU, (11, 24), None, "24 bits of mantissa on NVIDIA H100"),
        (FAST, GPU, (8, 11), None, "11 to 24 bits"),
        (FAST, TPU, (24, 24), None, "8 bits"),
        (BF16, GPU, (24, 24), None, "8 bits"),
        (EXACT, CPU, (24, 24), 8, "8 bits"),
        (EXACT, CPU, (8, 24), 11, "11 bits"),
    ],
)
def test_anything_else_is_told_in_one_line(precision, device, bits, emulation, meant):
    told = precision_warning(precision, found(24, *bits), emulation, device)
    assert told.startswith(f"WARNING: precision {precision.name} means {meant}")
    assert f"a dot keeps {bits[0]} and a convolution {bits[1]}" in told
    assert "\n" not in told
