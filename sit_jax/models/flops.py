"""Multiply-adds of DiT, SiT and MDT, which planning and MFU are computed from.

The papers' tables call these numbers GFLOPs; floating-point operations are twice as
many. A training step takes three times as many as its forward passes.
"""

import numpy as np

from sit_jax.models.dit import DiT
from sit_jax.models.mdt import MDT, MDTv2, bucket_sizes


def forward_macs(model: DiT | MDT, shape: tuple[int, int, int]) -> int:
    """Returns multiply-adds of one plain forward pass over one image [h, w, c]."""
    height, width, channels = shape
    d, pixels = model.width, model.patch**2 * channels
    tokens = height * width // model.patch**2
    out = pixels * (2 if model.learn_sigma else 1)
    blocks = model.depth * (_block_macs(model, tokens) + 6 * d * d)
    skips = sum(_num_skips(model)) * 2 * tokens * d**2
    ends = tokens * d * (pixels + out) + 256 * d + d * d + 2 * d * d
    return blocks + skips + ends


def step_macs(model: DiT | MDT, shape: tuple[int, int, int]) -> int:
    """Returns multiply-adds of all forward passes of a training step over one image.

    MDT's masked pass counts with the mean of the sizes in its mask buckets.
    """
    plain = forward_macs(model, shape)
    if not isinstance(model, MDT) or model.mask_ratio is None:
        return plain
    tokens, d = shape[0] * shape[1] // model.patch**2, model.width
    encoder_skips, _ = _num_skips(model)
    saved = []  # by the tokens that the encoder does not see
    for visible in bucket_sizes(model, tokens):
        less = _block_macs(model, tokens) - _block_macs(model, visible)
        skips = encoder_skips * 2 * (tokens - visible) * d**2
        saved.append((model.depth - model.decoder) * less + skips)
    side_block = _block_macs(model, tokens) + 6 * d**2
    return 2 * plain + side_block - int(np.mean(saved))


def _block_macs(model, tokens):
    """Returns multiply-adds of a block, without those of its adaLN layer."""
    d, hidden = model.width, int(model.width * model.mlp_ratio)
    return tokens * (4 * d * d + 2 * d * hidden + 2 * tokens * d)


def _num_skips(model):
    """Returns how many blocks of the encoder and of the decoder merge a long skip."""
    if not isinstance(model, MDTv2):
        return 0, 0
    return (model.depth - model.decoder) // 2, model.decoder
