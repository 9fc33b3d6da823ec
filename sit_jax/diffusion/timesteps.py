"""Which steps of a diffusion are trained on, by how large their losses have been.

Without one of these, or of time_densities.py, a process draws its times itself,
uniformly. Both have .begin(process), .draw(process, key, losses, n) -> times [n] and
weights of their losses [n] or None, and .add(losses, t, loss).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from sit_jax.errors import UserError


class LossHistory(struct.PyTreeNode):
    """The last losses of every step of a diffusion."""

    last: jax.Array  # [steps, history], a ring
    counts: jax.Array  # int [steps], all that there were


@dataclasses.dataclass(frozen=True)
class LossSecondMoment:
    """Steps drawn by the root mean square of their last losses, as ADM offers it.

    Nichol and Dhariwal, arXiv:2102.09672, section 3.3; history and uniform are those of
    its code. Until every step has `history` losses, steps are drawn uniformly.
    """

    history: int = 10
    uniform: float = 0.001  # share of the draws that stays uniform

    def __post_init__(self):
        if self.history < 1 or not 0 <= self.uniform <= 1:
            raise UserError(
                f"history={self.history} of LossSecondMoment must be at least 1, "
                f"uniform={self.uniform} in [0, 1]"
            )

    def begin(self, process):
        """-> Losses, none yet."""
        if not hasattr(process, "betas"):
            raise UserError(
                "timesteps=LossSecondMoment needs a Diffusion; "
                f"{type(process).__name__} has no steps to count"
            )
        steps = len(process.betas)
        return LossHistory(
            jnp.zeros((steps, self.history)), jnp.zeros(steps, jnp.int32)
        )

    def draw(self, process, key, losses, n):
        """-> t int [n], and the weights [n] that keep the mean loss what it was."""
        del process
        steps, chances = len(losses.counts), self.chances(losses)
        t = jax.random.choice(key, steps, (n,), p=chances)
        return t, 1 / (steps * chances[t])

    def chances(self, losses):
        """-> the probability of every step."""
        steps = len(losses.counts)
        size = jnp.sqrt(jnp.mean(losses.last**2, axis=1))
        by_size = (1 - self.uniform) * size / size.sum() + self.uniform / steps
        known = (losses.counts >= self.history).all()
        return jnp.where(known, by_size, 1 / steps)

    def add(self, losses, t, loss):
        """Losses with those of a batch, t int [n] and loss [n], in its order."""
        same = t[:, None] == t[None]
        before, after = jnp.tril(same, -1).sum(1), jnp.triu(same, 1).sum(1)
        place = (losses.counts[t] + before) % self.history
        # of more than `history` for one step the last ones stay; others go nowhere
        row = jnp.where(after < self.history, t, len(losses.counts))
        last = losses.last.at[row, place].set(loss, mode="drop")
        return LossHistory(last, losses.counts.at[t].add(1))


def quartile_means(rows, t, end):
    """{name: [B]} at times t [B] of 0..end -> {name_q0..q3: mean in that quarter}.

    A quarter that no time fell into gives nan, which the log leaves out.
    """
    quarter = jnp.clip(jnp.floor(4 * t / end), 0, 3)
    found = {}
    for i in range(4):
        here = quarter == i
        for name, row in rows.items():
            found[f"{name}_q{i}"] = jnp.where(here, row, 0).sum() / here.sum()
    return found


def uniform(u):
    return u


@dataclasses.dataclass(frozen=True)
class LogitNormal:
    """log(t / (1 - t)) is normal: times in the middle, where the task is hardest.

    Esser et al., equation 19; the published best is mean 0, std 1.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise UserError(
                f"LogitNormal(mean={self.mean}, std={self.std}): the mean must be "
                "finite, the std positive"
            )

    def __call__(self, u):
        return jax.nn.sigmoid(self.mean + self.std * jax.scipy.special.ndtri(u))


@dataclasses.dataclass(frozen=True)
class Mode:
    """More of the middle (scale > 0) or of the ends (scale < 0), all times covered.

    Esser et al., equation 20, who tried scales from -1 to 1.75; 1.29 was their best.
    """

    scale: float = 1.29

    def __post_init__(self):
        if not -1 <= self.scale <= 2 / (math.pi - 2):
            raise UserError(
                f"Mode(scale={self.scale}): beyond -1 .. {2 / (math.pi - 2):.4f} the "
                "times are not in order"
            )

    def __call__(self, u):
        return u - self.scale * (jnp.sin(u * math.pi / 2) ** 2 - u)


def cosmap(u):
    """The signal-to-noise ratios of the cosine schedule; Esser et al., equation 21."""
    s, c = jnp.sin(u * math.pi / 2), jnp.cos(u * math.pi / 2)
    return s / (s + c)


@dataclasses.dataclass(frozen=True)
class DensityTimesteps:
    """A `timesteps` of a config: times by a density, perhaps with importance weights.

    weighted: losses are multiplied by 1 / density, so that their mean estimates that
    of uniform times, with another variance. Else the density is part of what is
    trained on, as published.
    """

    quantile: Callable = uniform
    weighted: bool = False

    def begin(self, process):
        if not hasattr(process, "train_span"):
            raise UserError(
                f"timesteps=Times needs an Interpolant; {type(process).__name__} has "
                "steps: use LossSecondMoment"
            )
        return ()

    def draw(self, process, key, losses, n):
        """-> t [n] within the process's span, and weights [n] or None."""
        del losses
        # half a unit in the last place off both ends, where quantiles may be infinite
        u = jax.random.uniform(key, (n,), minval=2.0**-25, maxval=1 - 2.0**-24)
        unit, slope = jax.jvp(self.quantile, (u,), (jnp.ones_like(u),))
        first, last = process.train_span()
        return first + (last - first) * unit, slope if self.weighted else None

    def add(self, losses, t, loss):
        del t, loss
        return losses
