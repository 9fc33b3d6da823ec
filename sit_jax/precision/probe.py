"""How many bits of mantissa this device keeps of what it multiplies, measured.

A number that needs p bits is multiplied by 1, and beside it all its bits but the last
one, in pieces that any device keeps, by -1. The sum is the last bit if the number was
kept, in whatever order it is formed, and something else if it was rounded. Such sums
for p = 2..24 are rows of one matrix and columns of the other, so that the rounding of
either operand shows. The matrices are large enough for the units that do the real work.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.precision.policy import Precision

SIZE = 128  # a TPU's matrix unit; smaller or thinner products may go elsewhere
BITS = np.arange(2, 25)  # float32 has 24
# Of no regularity: 1 + 2^-23, say, is the sum of two numbers of one bit, which a device
# keeps that multiplies float32 as the sum of two bfloat16. Of these digits it keeps 17.
DIGITS = 0b101001110110011011110100


def measure_mantissa_bits(
    wrap: Callable[[Callable], Callable] | None = None, dtype: str = "float32"
) -> dict[str, int]:
    """Returns bits of {"default dot", "model dot", "convolution"} on this device.

    24 bits are float32, 11 TF32, 8 bfloat16.

    Args:
      wrap: fn -> fn, as it is done to the network (policy.with_precision, or
        emulation.emulate), which the last two go through.
      dtype: what the network computes in.
    """
    wrap = wrap or (lambda fn: fn)
    cast = lambda *operands: [x.astype(dtype) for x in operands]

    @jax.jit
    def products(left: Any, right: Any, image: Any, kernel: Any) -> tuple:
        dot = wrap(lambda a, b: jnp.matmul(*cast(a, b)))
        conv = wrap(lambda a, b: _convolve_patches(*cast(a, b)))
        return left @ right, dot(left, right), conv(image, kernel)

    names = ("default dot", "model dot", "convolution")
    measured = jax.device_get(products(*operands()))
    return {name: bits(product) for name, product in zip(names, measured, strict=True)}


def describe_precision(
    precision: Precision,
    measured: Mapping[str, int],
    emulating: str | None = None,
) -> str:
    """Returns the line that a script prints at its start.

    Args:
      precision: the one chosen.
      measured: from measure_mantissa_bits.
      emulating: an emulated platform's name.
    """
    name = precision.name + (f", emulating {emulating}" if emulating else "")
    return (
        f"precision: {name}; mantissa bits of a default dot {measured['default dot']}, "
        f"the model's {measured['model dot']}, convolution {measured['convolution']} "
        f"({jax.devices()[0].device_kind})"
    )


def precision_warning(
    precision: Precision,
    measured: Mapping[str, int],
    mantissa_bits: int | None = None,
    device: Any = None,
) -> str | None:
    """Returns a line where products are not as the precision says, or None.

    mantissa_bits is what an emulation leaves of operands; the others are as in
    describe_precision.
    """
    device = device or jax.devices()[0]
    _, low, high = precision.matmul_precision(device.platform)
    if mantissa_bits is not None:  # of the dtype's, whatever the platform
        low = high = min(mantissa_bits, jnp.finfo(precision.dtype).nmant + 1)
    dot, convolution = measured["model dot"], measured["convolution"]
    if low <= min(dot, convolution) and max(dot, convolution) <= high:
        return None
    expected = f"{low}" if low == high else f"{low} to {high}"
    return (
        f"WARNING: precision {precision.name} means {expected} bits of mantissa on "
        f"{device.device_kind}, but a dot keeps {dot} and a convolution {convolution}: "
        "numbers will not compare with other machines'; see whether XLA_FLAGS or "
        "NVIDIA_TF32_OVERRIDE are set"
    )


def operands() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns two matrices [SIZE, SIZE], and the same as an image and a kernel.

    The sums for BITS are in left @ right: in column 0, from row 1 on, those that show
    the rounding of left, and in row 0, from column 1 on, that of right.
    """
    left, right = np.zeros((2, SIZE, SIZE), np.float32)
    signs, sums = (1, -1, -1, -1), _numbers()
    left[0, :4] = right[:4, 0] = signs
    left[1 : len(sums) + 1, :4] = sums
    right[:4, 1 : len(sums) + 1] = sums.T
    image = np.zeros((2, 16, 16, SIZE), np.float32)  # 2 x 8 x 8 patches of 2 x 2
    image[:, ::2, ::2] = left.reshape(2, 8, 8, SIZE)
    kernel = np.zeros((2, 2, SIZE, SIZE), np.float32)
    kernel[0, 0] = right
    return left, right, image, kernel


def _numbers() -> np.ndarray:
    """Returns a number for each of BITS, and three pieces of the rest of it."""
    number = (DIGITS >> (24 - BITS) | 1) << (24 - BITS)
    rest = number ^ (1 << (24 - BITS))
    pieces = [rest & 255 << shift for shift in (16, 8, 0)]
    return np.stack([number, *pieces], axis=1) / 2.0**23


def _convolve_patches(image: Any, kernel: Any) -> Any:
    """Convolves as a DiT begins; the stride rules Winograd's method out."""
    layout = ("NHWC", "HWIO", "NHWC")
    convolve = jax.lax.conv_general_dilated
    out = convolve(image, kernel, (2, 2), "VALID", dimension_numbers=layout)
    return out.reshape(SIZE, SIZE)


def bits(product: np.ndarray) -> int:
    """Returns the bits of the operand that lost more of them.

    Args:
      product: left @ right of operands().
    """
    product, last = product.astype(np.float64), 2.0 ** (1 - BITS)
    of_left, of_right = product[1:, 0], product[0, 1:]
    is_kept = (of_left[: len(BITS)] == last) & (of_right[: len(BITS)] == last)
    return int(np.append(BITS - 1, 24)[np.append(is_kept, False).argmin()])
