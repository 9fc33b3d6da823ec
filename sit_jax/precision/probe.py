"""How many bits of mantissa this device keeps of what it multiplies, measured.

A number that needs p bits is multiplied by 1, and beside it all its bits but the last
one, in pieces that any device keeps, by -1. The sum is the last bit if the number was
kept, in whatever order it is formed, and something else if it was rounded. Such sums
for p = 2..24 are rows of one matrix and columns of the other, so that the rounding of
either operand shows. The matrices are large enough for the units that do the real work.
"""

import jax
import jax.numpy as jnp
import numpy as np

SIZE = 128  # a TPU's matrix unit; smaller or thinner products may go elsewhere
BITS = np.arange(2, 25)  # float32 has 24
# Of no regularity: 1 + 2^-23, say, is the sum of two numbers of one bit, which a device
# keeps that multiplies float32 as the sum of two bfloat16. Of these digits it keeps 17.
DIGITS = 0b101001110110011011110100


def measure_mantissa_bits(apply=None, dtype="float32"):
    """-> bits of {"default dot", "model dot", "convolution"} on the default device.

    apply: fn -> fn as it is done to the network (precision.applied, or emulated), which
    the last two go through. dtype: what the network computes in. 24 bits are float32,
    11 TF32, 8 bfloat16.
    """
    apply = apply or (lambda fn: fn)
    low = lambda *operands: [x.astype(dtype) for x in operands]

    @jax.jit
    def products(left, right, image, kernel):
        default = left @ right
        dot = apply(lambda a, b: jnp.matmul(*low(a, b)))(left, right)
        return default, dot, apply(lambda a, b: _patches(*low(a, b)))(image, kernel)

    names = ("default dot", "model dot", "convolution")
    measured = jax.device_get(products(*operands()))
    return {name: bits(product) for name, product in zip(names, measured, strict=True)}


def describe_precision(precision, measured, emulating=None, device=None):
    """What a script prints at its start. emulating: an emulated platform's name."""
    word = precision.word + (f", emulating {emulating}" if emulating else "")
    return (
        f"precision: {word}; mantissa bits of a default dot {measured['default dot']}, "
        f"the model's {measured['model dot']}, convolution {measured['convolution']} "
        f"({_default(device).device_kind})"
    )


def precision_warning(precision, measured, mantissa_bits=None, device=None):
    """-> a warning of one line where products are not as the word says, or None.

    mantissa_bits: what an emulation leaves of operands, else None.
    """
    device = _default(device)
    _, least, most = precision.products(device.platform)
    if mantissa_bits is not None:  # of the dtype's, whatever the platform
        least = most = min(mantissa_bits, jnp.finfo(precision.dtype).nmant + 1)
    dot, convolution = measured["model dot"], measured["convolution"]
    if least <= min(dot, convolution) and max(dot, convolution) <= most:
        return None
    meant = f"{least}" if least == most else f"{least} to {most}"
    return (
        f"WARNING: precision {precision.word} means {meant} bits of mantissa on "
        f"{device.device_kind}, but a dot keeps {dot} and a convolution {convolution}: "
        "numbers will not compare with other machines'; see whether XLA_FLAGS or "
        "NVIDIA_TF32_OVERRIDE are set"
    )


def operands():
    """-> left and right [SIZE, SIZE], and the same as an image and a kernel of patches.

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


def _numbers():
    """-> for each of BITS a number of as many bits, and three pieces of its rest."""
    number = (DIGITS >> (24 - BITS) | 1) << (24 - BITS)
    rest = number ^ (1 << (24 - BITS))
    pieces = [rest & 255 << shift for shift in (16, 8, 0)]
    return np.stack([number, *pieces], axis=1) / 2.0**23


def _patches(image, kernel):
    """A convolution as a DiT begins with; its stride rules Winograd's method out."""
    layout = ("NHWC", "HWIO", "NHWC")
    convolve = jax.lax.conv_general_dilated
    out = convolve(image, kernel, (2, 2), "VALID", dimension_numbers=layout)
    return out.reshape(SIZE, SIZE)


def bits(product):
    """left @ right of operands() -> bits of the operand that lost more of them."""
    product, last = product.astype(np.float64), 2.0 ** (1 - BITS)
    by_left, by_right = product[1:, 0], product[0, 1:]
    kept = (by_left[: len(BITS)] == last) & (by_right[: len(BITS)] == last)
    return int(np.append(BITS - 1, 24)[np.append(kept, False).argmin()])


def _default(device):
    return device or jax.devices()[0]
