"""Classifier-free guidance, both halves: dropping labels, then extrapolating.

A scale is a number, a function of t [B] as the network sees it, or an Interval.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sit_jax.diffusion.paths import align
from sit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Interval:
    """Guidance for part of the way: progress from `low` to `high`, 0 noise and 1 data.

    Outside it the network is asked once, not twice (Kynkaanniemi et al.,
    arXiv:2404.07724, who give the interval in noise levels).
    """

    scale: float = 4.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self):
        if callable(self.scale) or not math.isfinite(self.scale):
            raise UserError(f"scale={self.scale} of Interval must be a finite number")
        if not 0 <= self.low < self.high <= 1:
            raise UserError(
                f"guidance interval {self.low},{self.high}: two numbers LO < HI in "
                "[0, 1]; 0 is noise, 1 is data"
            )

    def covers(self, progress):
        """progress [B] -> bool [B]."""
        return (self.low <= progress) & (progress <= self.high)


def drop_labels(key, labels, null, rate):
    """Training half: labels [B], each replaced by `null` with probability rate."""
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), null, labels)


def is_none(scale):
    """Whether a scale means one conditional pass: the number 1."""
    return not callable(scale) and not isinstance(scale, Interval) and scale == 1


def guided(net, labels, null, scale, channels=3, weak=None, progress=lambda t: t):
    """Sampling half: net(x, t, y) and labels [B] -> Net(x, t).

    Only the first `channels` outputs are extrapolated: the published models were
    measured so, though latents have four (GLIDE's RGB code is where it comes from).
    weak: a worse network with the same label to lead away from, instead of the same
    network without one (autoguidance, Karras et al., arXiv:2406.02507). progress turns
    what the network sees as t into the share of the way from noise to data.
    """
    alone = lambda x, t: net(x, t, labels)
    if is_none(scale):
        return alone

    def pair(x, t):
        if weak is not None:
            return alone(x, t), weak(x, t, labels)
        both = jnp.concatenate([labels, jnp.full_like(labels, null)])
        out = net(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        return jnp.split(out, 2)

    def everywhere(x, t):
        cond, free = pair(x, t)
        return _pushed(cond, free, _strength(scale, t, x, progress), channels)

    if not isinstance(scale, Interval):
        return everywhere

    def inside(x, t):
        within = scale.covers(progress(t)).any()
        return jax.lax.cond(within, everywhere, alone, x, t)

    return inside


def with_null_half(net, labels, null, scale, channels=3, progress=lambda t: t):
    """As the released forward_with_cfg: -> Net(x [2B, ...], t [2B]).

    The second half is the unguided one. It goes its own way in the channels that are
    not guided, yet the network sees the first half's x twice, so nothing comes of it
    but its share in an adaptive solver's error.
    """
    both = jnp.concatenate([labels, jnp.full_like(labels, null)])

    def net_of_both(x, t):
        half = x[: len(labels)]
        cond, free = jnp.split(net(jnp.concatenate([half, half]), t, both), 2)
        s = _strength(scale, t[: len(labels)], half, progress)
        return jnp.concatenate(
            [_pushed(cond, free, s, channels), _pushed(free, cond, 1 - s, channels)]
        )

    return net_of_both


def _strength(scale, t, x, progress):
    """The scale at times t [B], a number or as many axes as x."""
    if isinstance(scale, Interval):
        return align(jnp.where(scale.covers(progress(t)), scale.scale, 1.0), x)
    return align(scale(t), x) if callable(scale) else scale


def _pushed(cond, free, scale, channels):
    pushed = free[..., :channels] + scale * (
        cond[..., :channels] - free[..., :channels]
    )
    return jnp.concatenate([pushed, cond[..., channels:]], axis=-1)
