"""Classifier-free guidance, both halves: dropping labels, then extrapolating."""

import jax
import jax.numpy as jnp

from sit_jax.paths import align


def drop_labels(key, labels, null, rate):
    """Training half: labels [B], each replaced by `null` with probability rate."""
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), null, labels)


def guided(net, labels, null, scale, channels=3):
    """Sampling half: net(x, t, y) and labels [B] -> Net(x, t).

    scale is a number or a function of t [B]; the number 1 means one conditional pass.
    Only the first `channels` outputs are extrapolated: the published models were
    measured so, though latents have four (GLIDE's RGB code is where it comes from).
    """
    if not callable(scale) and scale == 1:
        return lambda x, t: net(x, t, labels)
    both = jnp.concatenate([labels, jnp.full_like(labels, null)])

    def guided_net(x, t):
        out = net(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        cond, free = jnp.split(out, 2)
        s = align(scale(t), x) if callable(scale) else scale
        pushed = free + s * (cond - free)
        return jnp.concatenate([pushed[..., :channels], cond[..., channels:]], axis=-1)

    return guided_net
