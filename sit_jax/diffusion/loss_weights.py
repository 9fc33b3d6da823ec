"""Min-SNR weights: an error of the data counts min(snr, most), whatever is predicted.

Hang et al., arXiv:2303.09556, where snr = alpha^2 / sigma^2. One derivation serves all
predictions: at a given x_t = alpha * data + sigma * noise an error d of the data is
one of -alpha / sigma * d of the noise, so the prediction p * data + q * noise is off by
(p - q * alpha / sigma) * d. Its squared error therefore has to be multiplied by

    min(snr, most) / (p - q * alpha / sigma)^2
        = min(alpha^2, most * sigma^2) / (p * sigma - q * alpha)^2.

That is min(snr, most) / snr for the noise, / (snr + 1) for the v of a path that keeps
the variance, and (1 - t)^2 * min(snr, most) for the velocity of the linear path.
"""

import dataclasses

import jax.numpy as jnp

from sit_jax.diffusion import predictions
from sit_jax.diffusion.gaussian import hybrid_loss, lookup
from sit_jax.diffusion.paths import sde_diffusion_rate
from sit_jax.errors import UserError

MOST = 5.0  # the paper's gamma


# A weight is a function (path, predicts, t) -> what multiplies the squared error. Those
# of the releases leave the velocity alone.


def unweighted(path, predicts, t):
    return 1.0


def velocity_weight(path, predicts, t):
    """Makes the error of the noise the error of the velocity it implies."""
    if predicts is predictions.velocity:
        return 1.0
    return (sde_diffusion_rate(path, t) / path(t)[1]) ** 2


def likelihood_weight(path, predicts, t):
    """Makes the loss a bound of the likelihood (Song et al., arXiv:2101.09258)."""
    if predicts is predictions.velocity:
        return 1.0
    return sde_diffusion_rate(path, t) / path(t)[1] ** 2


def min_snr_weight(alpha, sigma, p, q, most=MOST):
    """Of the squared error of p * data + q * noise, which the network predicts."""
    return jnp.minimum(alpha**2, most * sigma**2) / (p * sigma - q * alpha) ** 2


@dataclasses.dataclass(frozen=True)
class MinSnr:
    """An Interpolant's `weight`, for any path and prediction."""

    most: float = MOST

    def __post_init__(self):
        _check(self.most)

    def __call__(self, path, predicts, t):
        alpha, sigma = path(t)
        p, q = predicts(path, t)
        if predicts is predictions.score:  # its error counts in units of the noise
            p, q = p * sigma, q * sigma
        return min_snr_weight(alpha, sigma, p, q, self.most)


@dataclasses.dataclass(frozen=True)
class MinSnrHybridLoss:
    """A Diffusion's `objective`: hybrid with its squared error weighted, not its bound.

    Holds for whatever the process predicts; min_snr is what MDTv2 has in its place.
    """

    most: float = MOST

    def __post_init__(self):
        _check(self.most)

    def __call__(self, process, batch, out):
        at = batch.t[:, 0, 0, 0]
        each = min_snr_weight(*process.path(at), *process.target(at), self.most)
        return _weighted(hybrid_loss(process, batch, out), each)


def mdt_min_snr_loss(process, batch, out):
    """The objective of MDTv2, which gives all but the data the weight of the noise."""
    alpha_bar = process.alpha_bar[1:]
    snr = alpha_bar / (1 - alpha_bar)
    most = snr.clip(max=MOST)
    each = most if process.predicts is predictions.data else most / snr
    each = lookup(each, batch.t[:, 0, 0, 0])
    return _weighted(hybrid_loss(process, batch, out), each)


def _weighted(terms, each):
    mse = each * terms["mse"]
    loss = mse + terms["vb"] if "vb" in terms else mse
    return terms | {"loss": loss, "mse": mse}


def _check(most):
    if not most > 0:
        raise UserError(f"most={most} of a Min-SNR weight must be positive")
