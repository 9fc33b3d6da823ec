"""Stochastic interpolants: continuous time, any path, any prediction.

Ma et al., arXiv:2401.08740 (SiT); time 0 is noise and time 1 is data.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from sit_jax.diffusion import predictions
from sit_jax.diffusion.loss_weights import unweighted
from sit_jax.diffusion.paths import (
    expand_dims_like,
    interpolate,
    linear,
    path_derivatives,
)
from sit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Interpolant:
    """What is trained on, and where in time.

    weight: see above, and MinSnr of min_snr.py. A margin is how far times stay off an
    end of the path where something divides by 0. None: the published values, used only
    at the ends that need one. A given margin also holds for the velocity, at whichever
    ends are pure noise or pure data.
    """

    path: Callable = linear
    predicts: Callable = predictions.velocity
    weight: Callable = unweighted
    train_margin: float | None = None
    sample_margin: float | None = None
    end = 1  # what times lie below

    def __post_init__(self):
        for name in ("train_margin", "sample_margin"):
            margin = getattr(self, name)
            if margin is None:
                continue
            if not isinstance(margin, int | float) or not 0 <= margin < 0.5:
                raise UserError(f"{name}={margin}: give a number from 0 to below 0.5")

    def times(self, key, n):
        """-> t [n], uniform over the times that are trained on."""
        t0, t1 = self.train_span()
        return t0 + (t1 - t0) * jax.random.uniform(key, (n,))

    def loss(self, net, data, noise, t):
        """data, noise [B, H, W, C], t [B] -> {"loss": [B]}, means over H, W and C.

        The error of a score counts in units of noise: (sigma * score + noise)^2.
        """
        at = expand_dims_like(t, data)
        out = _first(net(interpolate(self.path, data, noise, at), t), data)
        p, q = self.predicts(self.path, at)
        error = out - (p * data + q * noise)
        if self.predicts is predictions.score:
            error *= self.path(at)[1]
        loss = jnp.mean(error**2, axis=tuple(range(1, data.ndim)))
        return {"loss": loss * self.weight(self.path, self.predicts, t)}

    def field(self, net, target):
        """-> Net giving `target` (velocity, score, ...) whatever net was trained on."""

        def field(x, t):
            out = _first(net(x, t), x)
            return predictions.convert(
                out, x, expand_dims_like(t, x), self.path, self.predicts, target
            )

        return field

    def progress(self, t):
        """Share of the way from noise to data."""
        return t

    def train_span(self):
        """-> first and last time that is trained on."""
        usual = 1e-3 if self._ends["no data at 0"] else 1e-5
        return self._span(self.train_margin, usual)

    def span(self, by_score=False, last=0.0, reverse=False):
        """-> the times where sampling starts and ends.

        by_score: the diffusion added is infinite where there is no data. last: size of
        a closing step that sampling leaves to do. reverse: from data to noise.
        """
        t0, t1 = self._span(self.sample_margin, 1e-3, by_score)
        t1 = 1 - last if last else t1
        return (t1, t0) if reverse else (t0, t1)

    def _span(self, margin, usual, by_score=False):
        # converting divides by alpha or sigma; a velocity is used as it comes
        careful = margin is not None or self.predicts is not predictions.velocity
        margin, ends = usual if margin is None else margin, self._ends
        off_0 = ends["steep at 0"] or ends["no data at 0"] and (careful or by_score)
        off_1 = ends["steep at 1"] or ends["no noise at 1"] and careful
        return margin if off_0 else 0.0, 1 - margin if off_1 else 1.0

    @functools.cached_property
    def _ends(self):
        """What the path does at its ends, so that any path gets the right margins."""
        with jax.ensure_compile_time_eval():  # numbers, also while tracing
            start, end = jnp.float32(0), jnp.float32(1)
            steep = lambda t: (
                not jnp.isfinite(jnp.stack(path_derivatives(self.path, t))).all()
            )
            return {
                "no data at 0": bool(abs(self.path(start)[0]) < 1e-6),
                "no noise at 1": bool(abs(self.path(end)[1]) < 1e-6),
                "steep at 0": steep(start),
                "steep at 1": steep(end),
            }


def _first(out, x):
    """The channels that predict x, in its precision; a variance half is dropped."""
    return out[..., : x.shape[-1]].astype(x.dtype)
