"""Times drawn by other densities than the uniform one, for an Interpolant.

A density is given by its quantile function, u -> time, u uniform in [0, 1], increasing
from 0 to 1; it has the value 1 / quantile'(u) there. Time 0 is noise and time 1 data,
as everywhere here. Esser et al. (arXiv:2403.03206, section 3.1) count the other way, so
the sign of LogitNormal's mean is theirs turned round; Mode and cosmap are symmetric.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sit_jax.errors import UserError


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
class Times:
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
