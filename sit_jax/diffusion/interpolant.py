"""Stochastic interpolants: continuous time, any path, any prediction.

With x_t = alpha(t) * data + sigma(t) * noise, a network is trained by

    loss = w(t) * mean((net(x_t, t) - (p(t) * data + q(t) * noise))^2),

where the prediction gives p and q, and the loss weight w. Time 0 is noise, 1 is data.

Source: Ma et al., arXiv:2401.08740 (SiT).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.diffusion import predictions
from sit_jax.diffusion.loss_weights import unweighted
from sit_jax.diffusion.paths import (
    expand_dims_like,
    interpolate,
    linear,
    path_derivatives,
)
from sit_jax.diffusion.predictions import Prediction
from sit_jax.errors import UserError
from sit_jax.typing import Batch, Net, PerImage

TRAIN_EPS, TRAIN_EPS_VP, SAMPLE_EPS = 1e-3, 1e-5, 1e-3  # as released with SiT


class PathEnds(NamedTuple):
    """What a path does at its two ends."""

    no_data_at_0: bool
    no_noise_at_1: bool
    steep_at_0: bool  # its derivative is infinite there
    steep_at_1: bool


@dataclasses.dataclass(frozen=True)
class Interpolant:
    """A process in continuous time; the defaults are the published SiT.

    Attributes:
      path: a function t -> (alpha, sigma).
      prediction: what the network is trained to predict.
      loss_weight: a function (path, prediction, t) -> factor of the squared error.
      train_eps: how far times of training stay away from an end of the path where
        something divides by 0. None: the published value, at the ends that need one.
        A given value also holds for the velocity, at whichever ends are pure noise or
        pure data.
      sample_eps: the same for sampling.
    """

    path: Callable = linear
    prediction: Prediction = predictions.velocity
    loss_weight: Callable = unweighted
    train_eps: float | None = None
    sample_eps: float | None = None
    max_time: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        margins = {"train_eps": self.train_eps, "sample_eps": self.sample_eps}
        for name, eps in margins.items():
            if eps is not None and not 0 <= eps < 0.5:
                raise UserError(f"{name}={eps}: give a number from 0 to below 0.5")

    def sample_times(self, key: Array, n: int) -> PerImage:
        """Returns n times, uniform over the times that are trained on."""
        t0, t1 = self.train_interval()
        return t0 + (t1 - t0) * jax.random.uniform(key, (n,))

    def losses(
        self, net: Net, data: Batch, noise: Batch, t: PerImage
    ) -> dict[str, PerImage]:
        """Returns {"loss": [b]}, means over height, width and channels.

        The error of a score counts in units of noise: (sigma * score + noise)^2.
        """
        t_full = expand_dims_like(t, data)  # (b, 1, 1, 1)
        out = _match_input(net(interpolate(self.path, data, noise, t_full), t), data)
        p, q = self.prediction.weights(self.path, t_full)
        error = out - (p * data + q * noise)
        if self.prediction.loss_in_noise_units:
            error *= self.path(t_full)[1]
        loss = jnp.mean(error**2, axis=tuple(range(1, data.ndim)))
        return {"loss": loss * self.loss_weight(self.path, self.prediction, t)}

    def prediction_fn(self, net: Net, target: Prediction) -> Net:
        """Returns a Net that gives `target`, whatever `net` was trained to predict."""

        convert = functools.partial(
            predictions.convert, path=self.path, source=self.prediction, target=target
        )

        def predict(x: Batch, t: PerImage) -> Batch:
            return convert(_match_input(net(x, t), x), x, expand_dims_like(t, x))

        return predict

    def progress(self, t: PerImage) -> PerImage:
        """Returns the share of the way from noise to data."""
        return t

    def train_interval(self) -> tuple[float, float]:
        """Returns the first and the last time that is trained on."""
        usual = TRAIN_EPS if self._ends.no_data_at_0 else TRAIN_EPS_VP
        return self._interval(self.train_eps, usual)

    def time_interval(
        self, *, by_score: bool = False, last_step: float = 0.0, reverse: bool = False
    ) -> tuple[float, float]:
        """Returns the times where sampling starts and ends.

        Args:
          by_score: the diffusion that is added is infinite where there is no data.
          last_step: size of a closing step that the sampler does itself, 0 for none.
          reverse: from data to noise.
        """
        t0, t1 = self._interval(self.sample_eps, SAMPLE_EPS, by_score=by_score)
        t1 = 1 - last_step if last_step else t1
        return (t1, t0) if reverse else (t0, t1)

    def _interval(
        self, eps: float | None, usual: float, by_score: bool = False
    ) -> tuple[float, float]:
        # converting divides by alpha or sigma; a velocity is used as it comes
        careful = eps is not None or self.prediction.singular_at_ends
        eps, ends = usual if eps is None else eps, self._ends
        off_0 = ends.steep_at_0 or ends.no_data_at_0 and (careful or by_score)
        off_1 = ends.steep_at_1 or ends.no_noise_at_1 and careful
        return eps if off_0 else 0.0, 1 - eps if off_1 else 1.0

    @functools.cached_property
    def _ends(self) -> PathEnds:
        """Measures the path at its ends, so that any path gets the right interval."""
        with jax.ensure_compile_time_eval():  # numbers, also while tracing
            start, end = jnp.float32(0), jnp.float32(1)

            def is_steep(t: Float[Array, ""]) -> bool:
                derivatives = jnp.stack(path_derivatives(self.path, t))
                return not jnp.isfinite(derivatives).all()

            no_data_at_0 = bool(abs(self.path(start)[0]) < 1e-6)
            no_noise_at_1 = bool(abs(self.path(end)[1]) < 1e-6)
            return PathEnds(no_data_at_0, no_noise_at_1, is_steep(start), is_steep(end))


def _match_input(out: Float[Array, "b h w _"], x: Batch) -> Batch:
    """Returns the channels that predict x, in its dtype; a variance half is dropped."""
    return out[..., : x.shape[-1]].astype(x.dtype)
