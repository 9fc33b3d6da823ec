"""Which times are trained on, if not those that a process draws uniformly.

DensityTimesteps draws continuous times by a density; LossSecondMoment draws the steps
of a discrete process by how large their losses have been. Both are TimestepSamplers:

    state = sampler.init(process)
    t, weights = sampler.sample(process, key, state, n)
    state = sampler.update(state, t, loss)

A density is given by its quantile function, u -> time, u uniform in [0, 1], increasing
from 0 to 1; it has the value 1 / quantile'(u) there. Time 0 is noise and time 1 data,
as everywhere here. Esser et al. (arXiv:2403.03206, section 3.1) count the other way, so
the sign of LogitNormal's mean is theirs turned round; Mode and cosmap are symmetric.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sit_jax.errors import UserError
from sit_jax.typing import ContinuousProcess, DiscreteProcess, PerImage, Process, Time


def uniform(u: PerImage) -> PerImage:
    """Returns u: the density 1."""
    return u


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """A density in which log(t / (1 - t)) is normal: most times are in the middle.

    Source: Esser et al., equation 19; the published best is mean 0, std 1.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise UserError(
                f"LogitNormal(mean={self.mean}, std={self.std}): the mean must be "
                "finite, the std positive"
            )

    def __call__(self, u: PerImage) -> PerImage:
        return jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(u))


@dataclasses.dataclass(frozen=True)
class Mode:
    """More of the middle (scale > 0) or of the ends (scale < 0), all times covered.

    Source: Esser et al., equation 20, who tried scales from -1 to 1.75; best was 1.29.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise UserError(
                f"Mode(scale={self.scale}): beyond -1 .. {2 / (math.pi - 2):.4f} the "
                "times are not in order"
            )

    def __call__(self, u: PerImage) -> PerImage:
        return u - self.scale * (jnp.sin(u * math.pi / 2) ** 2 - u)


def cosmap(u: PerImage) -> PerImage:
    """Returns times with the signal-to-noise ratios of the cosine schedule.

    Source: Esser et al., equation 21.
    """
    s, c = jnp.sin(u * math.pi / 2), jnp.cos(u * math.pi / 2)
    return s / (s + c)


@dataclasses.dataclass(frozen=True)
class DensityTimesteps:
    """Times of a continuous process by a density, perhaps with importance weights.

    Attributes:
      quantile: the density, see above.
      weighted: losses are multiplied by 1 / density, so that their mean estimates that
        of uniform times, with another variance. Else the density is part of what is
        trained on, as published.
    """

    quantile: Callable = uniform
    weighted: bool = False

    def init(self, process: Process) -> tuple[()]:
        """Returns the empty state; refuses a process without continuous time."""
        if not isinstance(process, ContinuousProcess):
            raise UserError(
                f"timesteps=DensityTimesteps needs an Interpolant; "
                f"{type(process).__name__} has steps: use LossSecondMoment"
            )
        return ()

    def sample(
        self, process: ContinuousProcess, key: Array, state: Any, n: int
    ) -> tuple[PerImage, PerImage | None]:
        """Returns n times within the process's interval, and weights or None."""
        del state
        # half a unit in the last place off both ends, where quantiles may be infinite
        u = jax.random.uniform(key, (n,), minval=2.0**-25, maxval=1 - 2.0**-24)
        unit, slope = jax.jvp(self.quantile, (u,), (jnp.ones_like(u),))
        first, last = process.train_interval()
        return first + (last - first) * unit, slope if self.weighted else None

    def update(self, state: Any, t: Time, loss: PerImage) -> Any:
        """Returns the state as it is."""
        del t, loss
        return state


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("last", "counts"), meta_fields=()
)
@dataclasses.dataclass(frozen=True)
class LossHistory:
    """The last losses of every step of a diffusion."""

    last: Float[Array, "steps history"]  # a ring
    counts: Int[Array, " steps"]  # all that there were


@dataclasses.dataclass(frozen=True)
class LossSecondMoment:
    """Steps drawn by the root mean square of their last losses.

    Until every step has `history` losses, steps are drawn uniformly.

    Attributes:
      history: losses kept for each step.
      uniform: share of the draws that stays uniform.

    Source: Nichol and Dhariwal, arXiv:2102.09672, section 3.3; numbers are those of
    ADM's code.
    """

    history: int = 10
    uniform: float = 0.001

    def __post_init__(self) -> None:
        if self.history < 1 or not 0 <= self.uniform <= 1:
            raise UserError(
                f"history={self.history} of LossSecondMoment must be at least 1, "
                f"uniform={self.uniform} in [0, 1]"
            )

    def init(self, process: Process) -> LossHistory:
        """Returns a LossHistory without losses; refuses a process without steps."""
        if not isinstance(process, DiscreteProcess):
            raise UserError(
                "timesteps=LossSecondMoment needs a GaussianDiffusion; "
                f"{type(process).__name__} has no steps to count"
            )
        steps = process.num_timesteps
        return LossHistory(
            last=jnp.zeros((steps, self.history)), counts=jnp.zeros(steps, jnp.int32)
        )

    def sample(
        self, process: DiscreteProcess, key: Array, state: LossHistory, n: int
    ) -> tuple[Int[Array, " n"], PerImage]:
        """Returns n steps, and weights that keep the mean loss what it was."""
        del process
        steps, probabilities = len(state.counts), self.probabilities(state)
        t = jax.random.choice(key, steps, (n,), p=probabilities)
        return t, 1 / (steps * probabilities[t])

    def probabilities(self, state: LossHistory) -> Float[Array, " steps"]:
        """Returns the probability of every step."""
        steps = len(state.counts)
        size = jnp.sqrt(jnp.mean(state.last**2, axis=1))
        by_size = (1 - self.uniform) * size / size.sum() + self.uniform / steps
        warmed_up = (state.counts >= self.history).all()
        return jnp.where(warmed_up, by_size, 1 / steps)

    def update(
        self, state: LossHistory, t: Int[Array, " n"], loss: PerImage
    ) -> LossHistory:
        """Returns the history with a batch's losses, in the batch's order."""
        same = t[:, None] == t[None]  # (n, n)
        before, after = jnp.tril(same, -1).sum(1), jnp.triu(same, 1).sum(1)
        slot = (state.counts[t] + before) % self.history
        # of more than `history` for one step the last ones stay; others go nowhere
        row = jnp.where(after < self.history, t, len(state.counts))
        last = state.last.at[row, slot].set(loss, mode="drop")
        return LossHistory(last=last, counts=state.counts.at[t].add(1))


def quartile_means(
    terms: Mapping[str, PerImage], t: Time, max_time: float
) -> dict[str, Float[Array, ""]]:
    """Returns {name_q0..q3: mean} of each term in quarters of the times 0..max_time.

    A quarter that no time fell into gives nan, which the log leaves out.
    """
    quarter = jnp.clip(jnp.floor(4 * t / max_time), 0, 3)
    means = {}
    for i in range(4):
        inside = quarter == i
        for name, rows in terms.items():
            means[f"{name}_q{i}"] = jnp.where(inside, rows, 0).sum() / inside.sum()
    return means
