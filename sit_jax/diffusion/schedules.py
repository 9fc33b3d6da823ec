"""How noisy each step of a diffusion is, and which steps a shorter chain visits.

A schedule is a function: number of steps -> betas, float64 [steps]. A spacing says
which of the steps are visited: a number, a tuple of numbers (one for each equal section
of the chain), or a function: number of steps -> indices.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from sit_jax.errors import UserError

Spacing: TypeAlias = int | tuple[int, ...] | Callable[[int], Sequence[int]]


def linear_betas(steps: int = 1000) -> np.ndarray:
    """Returns betas from 1e-4 to 0.02 at 1000 steps; fewer steps are larger.

    Source: Ho et al., arXiv:2006.11239, section 4.
    """
    scale = 1000 / steps
    return np.linspace(1e-4 * scale, 0.02 * scale, steps)


def cosine_betas(steps: int = 1000) -> np.ndarray:
    """Returns betas of which alpha_bar is a squared cosine, capped at 0.999.

    Source: Nichol and Dhariwal, arXiv:2102.09672, equation 17.
    """
    edges = np.arange(steps + 1) / steps
    alpha_bar = np.cos((edges + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


def space_timesteps(total: int, spacing: Spacing) -> tuple[int, ...]:
    """Returns the indices of the visited steps, ascending, out of 0..total-1.

    A section gives its first and last step and evenly spread ones between. One that
    gives a single step gives its first: the released rule, although a chain of the one
    step 0 takes its starting noise for almost clean data.
    """
    check_spacing(spacing)
    if callable(spacing):
        return tuple(spacing(total))
    if isinstance(spacing, tuple):
        return _space_sections(total, spacing)
    if spacing > total:
        raise UserError(f"{spacing} steps of a diffusion of {total}: at most {total}")
    return _space_sections(total, (spacing,))


def check_spacing(spacing: Spacing) -> None:
    """Refuses what can never be a spacing, whatever the number of steps."""
    if callable(spacing):
        return
    counts = spacing if isinstance(spacing, tuple) else (spacing,)
    is_whole = all(isinstance(count, int | np.integer) for count in counts)
    if not (is_whole and sum(counts) >= 1 and min(counts) >= 0):
        raise UserError(
            f"steps={spacing!r} is not a spacing: give a number of at least one, a "
            "tuple of numbers or a function"
        )


def check_betas(betas: np.ndarray) -> None:
    """Refuses betas outside 0..1."""
    if not (min(betas) > 0 and max(betas) < 1):
        raise UserError(
            f"a schedule of {len(betas)} steps has betas from {min(betas):.3g} to "
            f"{max(betas):.3g}, outside 0..1; keep steps=1000, a sampler may take fewer"
        )


@dataclasses.dataclass(frozen=True)
class DDIMSpacing:
    """Every k-th step from 0 on, k the smallest that visits exactly `steps` of them.

    It exists only where such a k does.

    Source: Song et al., arXiv:2010.02502, appendix D.2 (their "linear" choice).
    """

    steps: int = 50

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"DDIMSpacing of {self.steps!r} steps: at least one needed")

    def __call__(self, total: int) -> tuple[int, ...]:
        visits = {k: len(range(0, total, k)) for k in range(1, total)}
        for stride, count in visits.items():
            if count == self.steps:
                return tuple(range(0, total, stride))
        nearest = sorted(set(visits.values()), key=lambda n: (abs(n - self.steps), n))
        raise UserError(
            f"no stride visits {self.steps} of {total} steps; "
            f"nearest are {' and '.join(map(str, nearest[:2]))}"
        )


def _space_sections(total: int, counts: tuple[int, ...]) -> tuple[int, ...]:
    indices: list[int] = []
    start = 0
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
        offsets = itertools.accumulate([0.0] + [stride] * (count - 1)) if count else ()
        indices += [start + round(offset) for offset in offsets]
        start += size
    return tuple(indices)
