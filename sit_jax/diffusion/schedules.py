"""How noisy each step of a diffusion is, and which steps a shorter chain visits.

A schedule is a function: number of steps -> betas, float64 [steps]. A spacing says
which of the steps are kept: a number, a tuple of numbers (one for each equal section
of the chain), or a function: number of steps -> indices.
"""

import dataclasses
import itertools

import numpy as np

from sit_jax.errors import UserError


def linear_betas(steps=1000):
    """From 1e-4 to 0.02 at 1000 steps (Ho et al. 2020); fewer steps are larger."""
    scale = 1000 / steps
    return np.linspace(1e-4 * scale, 0.02 * scale, steps)


def cosine_betas(steps=1000):
    """alpha_bar a squared cosine (Nichol & Dhariwal 2021, eq. 17), beta capped."""
    edges = np.arange(steps + 1) / steps
    alpha_bar = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def space_timesteps(total, spacing):
    """Indices of the kept steps, ascending, out of 0..total-1.

    A section gives its first and last step and evenly spread ones between. One that
    gives a single step gives its first: the released rule, kept although a chain of
    the one step 0 takes its starting noise for almost clean data.
    """
    check_spacing(spacing)
    if callable(spacing):
        return tuple(spacing(total))
    if isinstance(spacing, tuple):
        return _sections(total, spacing)
    if spacing > total:
        raise UserError(f"{spacing} steps of a diffusion of {total}: at most {total}")
    return _sections(total, (spacing,))


def check_spacing(spacing):
    """Refuses what can never be a spacing, whatever the number of steps."""
    if callable(spacing):
        return
    counts = spacing if isinstance(spacing, tuple) else (spacing,)
    if not all(map(_whole, counts)):
        wanted = "a number, a tuple of numbers or a function"
        raise UserError(f"steps={spacing!r} is not a spacing: give {wanted}")
    if sum(counts) < 1 or min(counts) < 0:
        raise UserError(f"steps={spacing!r}: a chain needs at least one step")


def check_betas(betas):
    if not (min(betas) > 0 and max(betas) < 1):
        raise UserError(
            f"a schedule of {len(betas)} steps has betas from {min(betas):.3g} to "
            f"{max(betas):.3g}, outside 0..1; keep steps=1000, a sampler may take fewer"
        )


def check_use_timesteps(kept, total):
    """None keeps all."""
    if kept is None:
        return
    rising = all(map(_whole, kept)) and all(a < b for a, b in itertools.pairwise(kept))
    if not (kept and rising and kept[0] >= 0 and kept[-1] < total):
        raise UserError(
            f"kept={kept} must be ascending step numbers from 0 to {total - 1}; "
            f"leave it None and use respaced(number of steps)"
        )


@dataclasses.dataclass(frozen=True)
class DDIMSpacing:
    """Every k-th step from 0 on, k the smallest that visits exactly `steps` of them.

    The spacing of Song et al. 2021; it exists only where such a k does.
    """

    steps: int = 50

    def __post_init__(self):
        if not _whole(self.steps) or self.steps < 1:
            raise UserError(f"DdimSpacing of {self.steps!r} steps: at least one needed")

    def __call__(self, total):
        visits = {k: len(range(0, total, k)) for k in range(1, total)}
        for stride, count in visits.items():
            if count == self.steps:
                return tuple(range(0, total, stride))
        nearest = sorted(set(visits.values()), key=lambda n: (abs(n - self.steps), n))
        raise UserError(
            f"no stride visits {self.steps} of {total} steps; "
            f"nearest are {' and '.join(map(str, nearest[:2]))}"
        )


def _sections(total, counts):
    kept, start = [], 0
    for i, count in enumerate(counts):
        size = total // len(counts) + (i < total % len(counts))
        if count > size:
            raise UserError(
                f"section {i + 1} of {len(counts)} has {size} of the {total} steps, "
                f"{count} asked for: at most {size}"
            )
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # summed and rounded half to even, as the released rule does: a product
        # instead of the sum would pick other steps for some counts
        places = itertools.accumulate([0.0] + [stride] * (count - 1)) if count else ()
        kept += [start + round(place) for place in places]
        start += size
    return tuple(kept)


def _whole(number):
    return hasattr(number, "__index__") and not isinstance(number, bool)


def posterior_coefficients(beta, before, after):
    """q(x_{t-1} | x_t, data): weight of data, weight of x_t, variance.

    before and after are alpha_bar at t-1 and t. Ho et al. 2020, eq. 7.
    """
    on_data = beta * np.sqrt(before) / (1 - after)
    on_x = (1 - before) * np.sqrt(1 - beta) / (1 - after)
    return on_data, on_x, beta * (1 - before) / (1 - after)
