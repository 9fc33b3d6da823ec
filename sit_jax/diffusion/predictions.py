"""What a network's output means, as weights (p, q) with out = p * data + q * noise.

Together with x_t = alpha * data + sigma * noise that is two equations in two
unknowns, so any prediction turns into any other by solving them.
"""

import dataclasses
from functools import partial
from typing import Any

from jaxtyping import Array, Float

from sit_jax.diffusion.paths import path_derivatives
from sit_jax.typing import NamedFunction, Path

Weights = tuple[Any, Any]


@dataclasses.dataclass(frozen=True, repr=False)
class Prediction(NamedFunction):
    """A kind of prediction: a function (path, t) -> (p, q), and what it needs.

    Attributes:
      loss_in_noise_units: an error is multiplied by sigma before it is squared.
      singular_at_ends: turning it into a velocity divides by alpha or sigma, so times
        must stay away from the ends of a path where these are 0.
      needs_derivatives: p and q are derivatives of the path, which integer times lack.
    """

    loss_in_noise_units: bool = False
    singular_at_ends: bool = True
    needs_derivatives: bool = False

    def weights(self, path: Path, t: Any) -> Weights:
        """Returns p and q at times t."""
        return self.function(path, t)


@partial(Prediction, singular_at_ends=False, needs_derivatives=True)
def velocity(path: Path, t: Any) -> Weights:
    """The derivative of x_t by time."""
    return path_derivatives(path, t)


@Prediction
def noise(path: Path, t: Any) -> Weights:
    """The noise in x_t (epsilon of DDPM)."""
    return 0.0, 1.0


@Prediction
def data(path: Path, t: Any) -> Weights:
    """The data in x_t."""
    return 1.0, 0.0


@partial(Prediction, loss_in_noise_units=True)
def score(path: Path, t: Any) -> Weights:
    """The gradient of log p(x_t | data)."""
    return 0.0, -1.0 / path(t)[1]


def convert(
    out: Float[Array, "b ..."],
    x_t: Float[Array, "b ..."],
    t: Float[Array, "..."],
    path: Path,
    *,
    source: Prediction,
    target: Prediction,
) -> Float[Array, "b ..."]:
    """Turns a `source` prediction at x_t into a `target` prediction.

    Args:
      out: the network's output.
      x_t: what the network saw.
      t: its times, broadcast against x_t (see paths.expand_dims_like).
      path: the path of the process.
      source: what `out` means.
      target: what is wanted.

    Returns:
      The prediction, shaped like x_t. Not finite where the two equations say the same,
      as for noise where alpha is 0.
    """
    if source == target:
        return out
    alpha, sigma = path(t)
    p, q = source.weights(path, t)
    det = alpha * q - sigma * p
    data, noise = (q * x_t - sigma * out) / det, (alpha * out - p * x_t) / det
    p, q = target.weights(path, t)
    return p * data + q * noise
