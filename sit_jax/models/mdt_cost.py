"""Multiply-adds of MDT, of a plain pass and of a training step."""

import numpy as np

from sit_jax.models import dit, masking
from sit_jax.models.mdt import MDTv2


def macs(model, shape):
    """Multiply-adds of one plain pass over one image [H, W, C], as dit.macs."""
    _, joining = _lengths(model)
    tokens = shape[0] * shape[1] // model.patch**2
    return dit.macs(model, shape) + sum(joining) * 2 * tokens * model.width**2


def step_macs(model, shape):
    """Those of all passes of a training step; the masked one at its sizes' mean."""
    plain = macs(model, shape)
    if model.hide is None:
        return plain
    (encoder, _), (joining, _) = _lengths(model)
    tokens = shape[0] * shape[1] // model.patch**2
    sizes = masking.sizes(tokens, model.hide, model.spread, model.sizes)
    seen, width = np.asarray(sizes), model.width
    one = lambda n: n * (4 + 2 * model.mlp_ratio) * width**2 + 2 * n * n * width
    saved = encoder * (one(tokens) - one(seen))
    saved += joining * 2 * (tokens - seen) * width**2
    return 2 * plain + int(one(tokens)) + 6 * width**2 - int(np.mean(saved))


def _lengths(model):
    """-> blocks of encoder and decoder, and how many of each merge a skip."""
    encoder, decoder = model.depth - model.decoder, model.decoder
    joining = (encoder // 2, decoder) if isinstance(model, MDTv2) else (0, 0)
    return (encoder, decoder), joining
