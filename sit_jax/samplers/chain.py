"""A diffusion's chain from noise to data, one kept step after the other.

A sampler is sampler(draw, process, net, noise) -> (data, stats), all [B, H, W, C].
draw(0) is the noise of the first step taken, the one out of the noisiest index.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.errors import UserError
from sit_jax.schedules import check_spacing


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """DDPM's reverse chain with the process's own variance.

    steps: a number, or any spacing of schedules.kept_steps. clip: the guess at the
    data to [-1, 1] at every step, which latents do not want.
    """

    steps: int | tuple | Callable = 250
    clip: bool = False

    def __post_init__(self):
        check_spacing(self.steps)

    def __call__(self, draw, process, net, noise):
        process = _short(self, process)

        def step(x, i, t):
            at = jnp.full(x.shape[:1], t)
            mean, log_var, _ = process.posterior(net, x, at, self.clip)
            return mean + (t > 0) * jnp.exp(log_var / 2) * draw(i)

        return _descend(process, step, noise)


@dataclasses.dataclass(frozen=True)
class Ddim:
    """Song et al. 2021, eq. 12: deterministic at eta = 0, DDPM's variance at eta = 1.

    steps: a number, or any spacing of schedules.kept_steps; DdimSpacing is the paper's.
    """

    steps: int | tuple | Callable = 50
    eta: float = 0.0
    clip: bool = False

    def __post_init__(self):
        check_spacing(self.steps)
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta={self.eta} of Ddim must lie between 0 and 1")

    def __call__(self, draw, process, net, noise):
        process = _short(self, process)
        on_data, on_x, std = (
            jnp.asarray(table, jnp.float32) for table in self.weights(process)
        )

        def step(x, i, t):
            data = process.posterior(net, x, jnp.full(x.shape[:1], t), self.clip)[2]
            kick = std[t] * draw(i) if self.eta else 0.0
            return on_data[t] * data + on_x[t] * x + kick

        return _descend(process, step, noise)

    def weights(self, process):
        """-> weights of data, x and fresh noise in the next x; float64, by index.

        The next x holds as much noise as its index wants: std of it is fresh, the
        rest is what x held, found by taking the guessed data out of x.
        """
        t = np.arange(len(process.betas))
        (alpha_, sigma_), (alpha, sigma) = process.levels(t - 1), process.levels(t)
        std = self.eta * sigma_ / sigma * np.sqrt(process.betas)
        on_x = np.sqrt(sigma_**2 - std**2) / sigma
        return alpha_ - alpha * on_x, on_x, std


def _short(sampler, process):
    """The process with the sampler's steps; one that is no chain is refused."""
    if not hasattr(process, "posterior"):
        raise UserError(
            f"{type(sampler).__name__} samples a Diffusion; "
            f"{type(process).__name__} has no chain of steps: use Ode or Sde"
        )
    return process.respaced(sampler.steps)


def _descend(process, step, noise):
    """step(x, number of the step, its index t) from the noisiest index to 0."""
    n = len(process.betas)

    def body(x, i):
        return step(x, i, n - 1 - i), None

    data, _ = jax.lax.scan(body, noise, jnp.arange(n))
    return data, {"evaluations": jnp.int32(n)}
