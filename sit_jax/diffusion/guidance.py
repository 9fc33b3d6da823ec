"""Classifier-free guidance, both halves: dropping labels, then extrapolating.

A scale is a number, a function of t [B] as the network sees it, or an Interval.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from sit_jax.diffusion.paths import expand_dims_like
from sit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class GuidanceInterval:
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


def is_unguided(scale):
    """Whether a scale means one conditional pass: the number 1."""
    return (
        not callable(scale) and not isinstance(scale, GuidanceInterval) and scale == 1
    )


def classifier_free_guidance(
    net, labels, null, scale, channels=3, weak=None, progress=lambda t: t
):
    """Sampling half: net(x, t, y) and labels [B] -> Net(x, t).

    Only the first `channels` outputs are extrapolated: the published models were
    measured so, though latents have four (GLIDE's RGB code is where it comes from).
    weak: a worse network with the same label to lead away from, instead of the same
    network without one (autoguidance, Karras et al., arXiv:2406.02507). progress turns
    what the network sees as t into the share of the way from noise to data.
    """
    alone = lambda x, t: net(x, t, labels)
    if is_unguided(scale):
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

    if not isinstance(scale, GuidanceInterval):
        return everywhere

    def inside(x, t):
        within = scale.covers(progress(t)).any()
        return jax.lax.cond(within, everywhere, alone, x, t)

    return inside


def guide_both_halves(net, labels, null, scale, channels=3, progress=lambda t: t):
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
    if isinstance(scale, GuidanceInterval):
        return expand_dims_like(
            jnp.where(scale.covers(progress(t)), scale.scale, 1.0), x
        )
    return expand_dims_like(scale(t), x) if callable(scale) else scale


def _pushed(cond, free, scale, channels):
    pushed = free[..., :channels] + scale * (
        cond[..., :channels] - free[..., :channels]
    )
    return jnp.concatenate([pushed, cond[..., channels:]], axis=-1)


@dataclasses.dataclass(frozen=True)
class PowerCosine:
    """From none at the noisiest step to `scale` at the cleanest, as MDT samples.

    1 + (scale - 1) (1 - cos(pi (1 - t / steps)^power)) / 2, where t is what the network
    is told: the step's number before respacing. The larger the power, the later it
    rises; near 0 it is `scale` all the way.
    """

    scale: float = 3.8
    power: float = 4.0
    steps: int = 1000

    def __post_init__(self):
        if not math.isfinite(self.scale):
            raise UserError(f"scale={self.scale} of PowerCosine must be finite")
        if not (self.power > 0 and math.isfinite(self.power)):
            raise UserError(f"power={self.power} of PowerCosine must be positive")
        if self.steps < 1:
            raise UserError(f"steps={self.steps} of PowerCosine: at least 1")

    def __call__(self, t):
        angle = jnp.pi * (1 - t / self.steps) ** self.power
        return 1 + (self.scale - 1) * (1 - jnp.cos(angle)) / 2


def check_guiding_model(parts, other, path):
    """Refuses a worse network (an Experiment) from which nothing can be led away."""
    if other.shape != parts.shape or other.model.classes != parts.model.classes:
        raise UserError(
            f"--autoguidance {path} is for {other.shape} in {other.model.classes} "
            f"classes, not for {parts.shape} in {parts.model.classes}"
        )
    ours, theirs = (_asked(each.process) for each in (parts, other))
    if ours != theirs:
        raise UserError(
            f"--autoguidance {path} answers another question: {theirs}, where "
            f"{ours} is led away from; take a worse network of the same process"
        )


def _asked(process):
    """What its networks are asked, in words: alike where outputs mean the same."""
    names = ("path", "schedule", "steps", "predicts")
    fields = {f.name for f in dataclasses.fields(process)}.intersection(names)
    word = lambda value: getattr(value, "__name__", str(value))
    said = [f"{n}={word(getattr(process, n))}" for n in names if n in fields]
    return f"{type(process).__name__}({', '.join(said)})"
