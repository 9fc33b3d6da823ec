"""The noise that the released PyTorch scripts draw on a CPU, for the same pictures.

They seed the one generator of the process, build the network, whose initial values
take numbers from it although they are overwritten by the checkpoint, and draw then.
What cannot be had here is the noise of a CUDA generator, which is another algorithm.
"""

import math

import numpy as np

from sit_jax.errors import UserError

MOST = 4 * 2**30  # bytes of noise for a sampler's steps
SKIP = 2**24  # numbers thrown away at a time


def words_before_noise(model, shape):
    """How many 32-bit numbers the released code takes to build this DiT or SiT.

    Every linear layer is initialised by PyTorch (weight and bias) and its weight again
    by Xavier's rule; the patch convolution likewise; the time network's weights and
    the label table once more by a normal law. Drawing a normal law of n values takes
    n numbers, and 16 more if n is no multiple of 16 (below 16 it would differ).
    """
    d, hidden = model.width, int(model.width * model.mlp_ratio)
    pixels = model.patch**2 * shape[-1]
    out = pixels * (2 if model.learn_sigma else 1)
    linear = lambda n, m: 2 * n * m + m
    block = linear(d, 3 * d) + linear(d, d) + linear(d, 6 * d)
    block += linear(d, hidden) + linear(hidden, d)
    time = linear(256, d) + linear(d, d) + _normal(256 * d) + _normal(d * d)
    labels = 2 * _normal((model.classes + model.null_label) * d)
    head = linear(d, out) + linear(d, 2 * d)
    return model.depth * block + linear(pixels, d) + time + labels + head


def torch_noise(seed, model, shape, count, kicks=0, doubled=True):
    """-> start [N, H, W, C] and the steps' noise [kicks, N, H, W, C], or None of it.

    shape: of one image, (H, W, C). doubled: the script runs guidance's null half beside
    the batch, so that each step draws for twice as many images.
    """
    size = math.prod(shape) * 4 * count
    if kicks * size > MOST:
        raise UserError(
            f"{kicks} steps of noise for {count} images are "
            f"{kicks * size / 1e9:.3g} GB; draw fewer images at once with torch's noise"
        )
    try:
        import torch
    except ImportError as error:
        raise UserError("--noise torch:SEED needs torch: pip install torch") from error
    generator = torch.Generator().manual_seed(seed)
    _skip(torch, generator, words_before_noise(model, shape))
    height, width, channels = shape

    def drawn(rows):
        draw = torch.randn(rows, channels, height, width, generator=generator)
        return np.moveaxis(draw[:count].numpy(), 1, -1).copy()

    start = drawn(count)
    steps = [drawn(2 * count if doubled else count) for _ in range(kicks)]
    return start, np.stack(steps) if kicks else None


def _skip(torch, generator, words):
    while words:
        part = min(words, SKIP)
        torch.rand(part, generator=generator)
        words -= part


def _normal(n):
    return n + 16 * (n % 16 > 0)
