"""What squared errors are multiplied by.

A loss weight of an Interpolant is a function (path, prediction, t) -> [b].

Min-SNR lets an error of the data count min(snr, gamma), whatever is predicted (Hang et
al., arXiv:2303.09556), where snr = alpha^2 / sigma^2. One derivation serves all
predictions: at a given x_t = alpha * data + sigma * noise an error d of the data is
one of -alpha / sigma * d of the noise, so the prediction p * data + q * noise is off by
(p - q * alpha / sigma) * d. Its squared error therefore has to be multiplied by

    min(snr, gamma) / (p - q * alpha / sigma)^2
        = min(alpha^2, gamma * sigma^2) / (p * sigma - q * alpha)^2.

That is min(snr, gamma) / snr for the noise, / (snr + 1) for the v of a path that keeps
the variance, and (1 - t)^2 * min(snr, gamma) for the velocity of the linear path.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.diffusion import predictions
from sit_jax.diffusion.gaussian import (
    GaussianDiffusion,
    NoisyBatch,
    hybrid_loss,
    lookup,
)
from sit_jax.diffusion.paths import sde_diffusion_rate
from sit_jax.diffusion.predictions import Prediction
from sit_jax.errors import UserError
from sit_jax.typing import Path, PerImage

GAMMA = 5.0  # the paper's


def unweighted(path: Path, prediction: Prediction, t: PerImage) -> float:
    """Returns 1: the published SiT."""
    return 1.0


def velocity_weight(path: Path, prediction: Prediction, t: PerImage) -> Any:
    """Makes the error of the noise the error of the velocity that it implies.

    A velocity stays as it is, here and in likelihood_weight, as in the releases.
    """
    if not prediction.singular_at_ends:
        return 1.0
    return (sde_diffusion_rate(path, t) / path(t)[1]) ** 2


def likelihood_weight(path: Path, prediction: Prediction, t: PerImage) -> Any:
    """Makes the loss a bound of the likelihood.

    Source: Song et al., arXiv:2101.09258.
    """
    if not prediction.singular_at_ends:
        return 1.0
    return sde_diffusion_rate(path, t) / path(t)[1] ** 2


def min_snr_weight(
    alpha: Float[Array, "..."],
    sigma: Float[Array, "..."],
    p: Any,
    q: Any,
    gamma: float = GAMMA,
) -> Float[Array, "..."]:
    """Returns the weight of the squared error of p * data + q * noise."""
    return jnp.minimum(alpha**2, gamma * sigma**2) / (p * sigma - q * alpha) ** 2


@dataclasses.dataclass(frozen=True)
class _MostSnr:
    most: float = GAMMA  # the paper's gamma

    def __post_init__(self) -> None:
        if not self.most > 0:
            raise UserError(f"most={self.most} of a Min-SNR weight must be positive")


class MinSnr(_MostSnr):
    """An Interpolant's loss weight, for any path and prediction."""

    def __call__(self, path: Path, prediction: Prediction, t: PerImage) -> PerImage:
        alpha, sigma = path(t)
        p, q = prediction.weights(path, t)
        if prediction.loss_in_noise_units:  # the error is multiplied by sigma already
            p, q = p * sigma, q * sigma
        return min_snr_weight(alpha, sigma, p, q, self.most)


class MinSnrHybridLoss(_MostSnr):
    """A GaussianDiffusion's loss: hybrid_loss with its squared error weighted.

    Holds for whatever the process predicts. The variational bound is not weighted.
    """

    def __call__(
        self, process: GaussianDiffusion, batch: NoisyBatch, out: Array
    ) -> dict[str, PerImage]:
        t = batch.t[:, 0, 0, 0]
        (alpha, sigma), (p, q) = process.path(t), process.target_weights(t)
        weights = min_snr_weight(alpha, sigma, p, q, self.most)
        return _weight_squared_error(hybrid_loss(process, batch, out), weights)


def mdt_min_snr_loss(
    process: GaussianDiffusion, batch: NoisyBatch, out: Array
) -> dict[str, PerImage]:
    """Returns the loss of MDTv2, in which all predictions but data weigh like noise.

    Source: MDT's code, masked_diffusion/gaussian_diffusion.py.
    """
    alpha_bar = process.alpha_bar[1:]
    snr = alpha_bar / (1 - alpha_bar)
    clipped = snr.clip(max=GAMMA)
    table = clipped if process.prediction == predictions.data else clipped / snr
    weights = lookup(table, batch.t[:, 0, 0, 0])
    return _weight_squared_error(hybrid_loss(process, batch, out), weights)


def _weight_squared_error(
    terms: dict[str, PerImage], weights: PerImage
) -> dict[str, PerImage]:
    mse = weights * terms["mse"]
    return terms | {"loss": mse + terms["vb"] if "vb" in terms else mse, "mse": mse}
