"""Classifier-free guidance, both halves: dropping labels, then extrapolating.

guided = uncond + scale * (cond - uncond). A scale is a number, a function of t [b] as
the network sees it, or a GuidanceInterval.

Source: Ho and Salimans, arXiv:2207.12598.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sit_jax.diffusion.paths import expand_dims_like
from sit_jax.errors import UserError
from sit_jax.typing import Batch, Labels, ModelApply, Net, PerImage, Time


@dataclasses.dataclass(frozen=True)
class GuidanceInterval:
    """Guidance for part of the way: progress from `low` to `high`, 0 noise and 1 data.

    Outside of it the network is asked once, not twice.

    Source: Kynkaanniemi et al., arXiv:2404.07724, who give it in noise levels.
    """

    scale: float = 4.0
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        is_number = not callable(self.scale) and math.isfinite(self.scale)
        if not (is_number and 0 <= self.low < self.high <= 1):
            raise UserError(
                f"guidance interval {self.low},{self.high} of scale {self.scale}: give "
                "a finite number, and LO < HI in [0, 1]; 0 is noise, 1 is data"
            )

    def covers(self, progress: PerImage) -> Bool[Array, " b"]:
        """Returns where guidance applies."""
        return (self.low <= progress) & (progress <= self.high)


@dataclasses.dataclass(frozen=True)
class PowerCosine:
    """A scale that rises from 1 at the noisiest step to `scale`, as MDT samples.

    1 + (scale - 1) (1 - cos(pi (1 - t / steps)^power)) / 2, where t is the step's
    number before respacing. The larger the power, the later it rises; near 0 it is
    `scale` all the way.

    Source: Gao et al., arXiv:2303.14389 (MDT), and its code.
    """

    scale: float = 3.8
    power: float = 4.0
    steps: int = 1000

    def __post_init__(self) -> None:
        power_fits = 0 < self.power < math.inf
        if not (math.isfinite(self.scale) and power_fits and self.steps >= 1):
            raise UserError(f"{self}: scale finite, power positive, steps at least 1")

    def __call__(self, t: Time) -> PerImage:
        angle = jnp.pi * (1 - t / self.steps) ** self.power
        return 1 + (self.scale - 1) * (1 - jnp.cos(angle)) / 2


Scale: TypeAlias = float | Callable[[Time], PerImage] | GuidanceInterval


def drop_labels(key: Array, labels: Labels, null_label: int, rate: float) -> Labels:
    """Returns labels, each replaced by null_label with probability rate."""
    dropped = jax.random.bernoulli(key, rate, labels.shape)
    return jnp.where(dropped, null_label, labels)


def is_unguided(scale: Scale) -> bool:
    """Returns whether a scale means one conditional pass: the number 1."""
    return (
        not callable(scale) and not isinstance(scale, GuidanceInterval) and scale == 1
    )


def classifier_free_guidance(
    apply: ModelApply,
    labels: Labels,
    null_label: int,
    scale: Scale,
    channels: int = 3,
    *,
    guiding_model: ModelApply | None = None,
    progress: Callable[[Time], PerImage] = lambda t: t,
) -> Net:
    """Binds labels to a network, and guides it.

    Args:
      apply: the network, (x, t, labels) -> out.
      labels: [b].
      null_label: what stands for "no label".
      scale: 1 asks the network once, with the labels.
      channels: only so many outputs are extrapolated. The published models were
        measured with 3, though latents have four (GLIDE's RGB code is the origin).
      guiding_model: a worse network with the same labels to be led away from, instead
        of the same network without labels (autoguidance, Karras et al.,
        arXiv:2406.02507).
      progress: turns times of the network into the share of the way from noise to data.

    Returns:
      A Net (x, t) -> out.
    """
    unguided = lambda x, t: apply(x, t, labels)
    if is_unguided(scale):
        return unguided

    def predict_both(x: Batch, t: Time) -> tuple[Array, Array]:
        if guiding_model is not None:
            return unguided(x, t), guiding_model(x, t, labels)
        both = jnp.concatenate([labels, jnp.full_like(labels, null_label)])  # (2b,)
        out = apply(jnp.concatenate([x, x]), jnp.concatenate([t, t]), both)
        cond, uncond = jnp.split(out, 2)
        return cond, uncond

    def guided(x: Batch, t: Time) -> Array:
        cond, uncond = predict_both(x, t)
        return extrapolate(cond, uncond, _scale_at(scale, t, x, progress), channels)

    if not isinstance(scale, GuidanceInterval):
        return guided

    def guided_inside(x: Batch, t: Time) -> Array:
        inside = scale.covers(progress(t)).any()
        return jax.lax.cond(inside, guided, unguided, x, t)

    return guided_inside


def guide_both_halves(
    apply: ModelApply,
    labels: Labels,
    null_label: int,
    scale: Scale,
    channels: int = 3,
    *,
    progress: Callable[[Time], PerImage] = lambda t: t,
) -> Net:
    """Returns a Net of x [2b, ...] and t [2b], as the released forward_with_cfg.

    The second half is the unguided one. It goes its own way in the channels that are
    not guided, yet the network sees the first half's x twice, so nothing comes of it
    but its share in an adaptive solver's error. For the arguments see
    classifier_free_guidance.
    """
    both = jnp.concatenate([labels, jnp.full_like(labels, null_label)])

    def guided(x: Batch, t: Time) -> Array:
        half = x[: len(labels)]
        cond, uncond = jnp.split(apply(jnp.concatenate([half, half]), t, both), 2)
        s = _scale_at(scale, t[: len(labels)], half, progress)
        first = extrapolate(cond, uncond, s, channels)
        return jnp.concatenate([first, extrapolate(uncond, cond, 1 - s, channels)])

    return guided


def extrapolate(
    cond: Float[Array, "b h w c"],
    uncond: Float[Array, "b h w c"],
    scale: Any,
    channels: int,
) -> Float[Array, "b h w c"]:
    """Returns uncond + scale * (cond - uncond) of the first channels, cond's others."""
    base = uncond[..., :channels]
    guided = base + scale * (cond[..., :channels] - base)
    return jnp.concatenate([guided, cond[..., channels:]], axis=-1)


def check_guiding_model(experiment: Any, other: Any, path: Any) -> None:
    """Refuses a guiding model (of another experiment) that does not fit."""
    sizes, other_sizes = ((e.shape, e.model.classes) for e in (experiment, other))
    if other_sizes != sizes:
        raise UserError(
            f"--autoguidance {path} is for {other_sizes[0]} in {other_sizes[1]} "
            f"classes, not for {sizes[0]} in {sizes[1]}"
        )
    ours, theirs = (_describe_prediction(e.process) for e in (experiment, other))
    if ours != theirs:
        raise UserError(
            f"--autoguidance {path} answers another question: {theirs}, where "
            f"{ours} is led away from; take a worse network of the same process"
        )


def _describe_prediction(process: Any) -> str:
    """Returns words that are equal where two networks' outputs mean the same."""
    names = {"path", "schedule", "steps", "prediction"}
    fields = {name: value for name, value in vars(process).items() if name in names}
    words = [f"{k}={getattr(v, '__name__', v)}" for k, v in fields.items()]
    return f"{type(process).__name__}({', '.join(words)})"


def _scale_at(scale: Scale, t: Time, x: Batch, progress: Callable) -> Any:
    """Returns the scale at times t [b]: a number, or with as many axes as x."""
    if isinstance(scale, GuidanceInterval):
        inside = scale.covers(progress(t))
        return expand_dims_like(jnp.where(inside, scale.scale, 1.0), x)
    return expand_dims_like(scale(t), x) if callable(scale) else scale
