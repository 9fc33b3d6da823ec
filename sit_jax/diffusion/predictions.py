"""What a network's output means, as weights (p, q) with out = p * data + q * noise.

Together with x_t = alpha * data + sigma * noise that is two equations in two
unknowns, so any prediction turns into any other by solving them.
"""

from sit_jax.diffusion.paths import path_derivatives
from sit_jax.diffusion.schedules import posterior_coefficients


def velocity(path, t):
    return path_derivatives(path, t)


def noise(path, t):
    return 0.0, 1.0


def data(path, t):
    return 1.0, 0.0


def score(path, t):
    """Gradient of log p(x_t | data)."""
    return 0.0, -1.0 / path(t)[1]


def previous_x(path, t):
    """Predicts the mean of q(x_{t-1} | x_t, data); linear in data and noise too."""
    (alpha_, _), (alpha, sigma) = path(t - 1), path(t)
    beta = 1 - (alpha / alpha_) ** 2
    on_data, on_x, _ = posterior_coefficients(beta, alpha_**2, alpha**2)
    return on_data + on_x * alpha, on_x * sigma


def convert(out, x_t, t, path, source, target):
    """Re-expresses out, a `source` prediction at x_t, as a `target` prediction.

    Not defined where the two equations say the same, as for noise where alpha is 0.
    """
    if source is target:
        return out
    alpha, sigma = path(t)
    p, q = source(path, t)
    det = alpha * q - sigma * p
    data_, noise_ = (q * x_t - sigma * out) / det, (alpha * out - p * x_t) / det
    p, q = target(path, t)
    return p * data_ + q * noise_
