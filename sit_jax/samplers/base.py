"""What all samplers share: their result, a loop that keeps states, and checks.

A sampler is a frozen dataclass, called as sampler(net, process, noise, step_noise). It
draws nothing itself: step_noise(i) is the noise of step i. See typing.Sampler.

A slope of an ODE is a function (t, x) -> dx/dt, where t is a number or [b], and x a
tree of arrays [b, ...].
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from sit_jax.diffusion import predictions
from sit_jax.errors import UserError
from sit_jax.ranges import AtLeast, Between
from sit_jax.typing import (
    Batch,
    ContinuousProcess,
    DiscreteProcess,
    Net,
    Process,
    Slope,
    StepNoise,
)

NUM_STEPS, NUM_STATES, TOLERANCE = AtLeast(1), AtLeast(0), AtLeast(0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SamplerResult:
    """What a sampler returns; counts are numbers, or [b] where images differ.

    Attributes:
      data: [b, h, w, c], or the tree that solve() was given.
      num_evaluations: of the network.
      num_accepted: steps of an adaptive solver, with those rejected; else None.
      num_rejected: see num_accepted.
      finished: False where an adaptive solver gave up before the end; else None.
      trajectory: states on the way [trajectory_length, b, ...], if asked for.
    """

    data: PyTree[Array]
    num_evaluations: Int[Array, "..."]
    num_accepted: Int[Array, "..."] | None = None
    num_rejected: Int[Array, "..."] | None = None
    finished: Bool[Array, "..."] | None = None
    trajectory: PyTree[Array] | None = None

    def stats(self) -> dict[str, Array]:
        """Returns what there is besides the data, by the names of manifests."""
        stats = {
            "evaluations": self.num_evaluations,
            "accepted": self.num_accepted,
            "rejected": self.num_rejected,
            "finished": self.finished,
            "trajectory": self.trajectory,
        }
        return {name: value for name, value in stats.items() if value is not None}


class ProbabilityFlowODE(abc.ABC):
    """Samples by the probability-flow ODE; a subclass says how a slope is followed.

    Attributes:
      reverse: from data to noise.
      trajectory_length: how many states on the way to keep.
    """

    reverse: bool
    trajectory_length: int

    @property
    def integrates_null_half(self) -> bool:
        """Whether guidance's unconditional half is integrated beside the batch."""
        return False

    def num_noise_draws(self, process: Process) -> int:
        """Returns 0: an ODE takes no noise."""
        return 0

    def __call__(
        self, net: Net, process: Process, noise: Batch, step_noise: Any = None
    ) -> SamplerResult:
        """Turns noise [b, h, w, c] into data, or the other way round."""
        continuous = require_continuous(self, process)
        velocity = continuous.prediction_fn(net, predictions.velocity)

        def slope(t: Any, x: Batch) -> Batch:
            return velocity(x, jnp.broadcast_to(jnp.float32(t), x.shape[:1]))

        t0, t1 = continuous.time_interval(reverse=self.reverse)
        return self.solve(slope, noise.astype(jnp.float32), t0, t1)

    @abc.abstractmethod
    def solve(
        self, slope: Slope, start: PyTree[Array], t0: float, t1: float
    ) -> SamplerResult:
        """Follows a slope from a tree of arrays at t0 to t1."""


def require_continuous(sampler: Any, process: Process) -> ContinuousProcess:
    """Returns the process; refuses one whose time is not continuous."""
    if isinstance(process, ContinuousProcess):
        return process
    raise UserError(
        f"{type(sampler).__name__} samples an Interpolant; {type(process).__name__} "
        "has no continuous path: use DDPM or DDIM (--sampler ddpm, ddim)"
    )


def require_discrete(sampler: Any, process: Process) -> DiscreteProcess:
    """Returns the process; refuses one that is no chain of steps."""
    if isinstance(process, DiscreteProcess):
        return process
    raise UserError(
        f"{type(sampler).__name__} samples a GaussianDiffusion; "
        f"{type(process).__name__} has no chain of steps: use FixedStepODE or SDE "
        "(--sampler heun, euler-maruyama)"
    )


def require_step_noise(sampler: Any, step_noise: StepNoise | None) -> StepNoise:
    """Returns step_noise; refuses a sampler of noisy steps without it."""
    if step_noise is None:
        raise UserError(f"{type(sampler).__name__} needs step_noise, see diffusion.rng")
    return step_noise


def run_steps(
    step: Callable[[Any, Array], Any],
    start: PyTree[Array],
    count: int,
    trajectory_length: int = 0,
) -> tuple[PyTree[Array], PyTree[Array] | None]:
    """Runs state = step(state, i) for i in 0 .. count - 1.

    Args:
      step: one step.
      start: the first state.
      count: how many steps.
      trajectory_length: how many states to keep, evenly spread over the steps; the
        last of them is the end.

    Returns:
      The last state, and the states kept [trajectory_length, ...] or None.
    """
    if trajectory_length > count:
        raise UserError(
            f"trajectory_length={trajectory_length}: there are only {count} steps"
        )
    empty = lambda x: jnp.zeros((trajectory_length, *x.shape), x.dtype)

    def body(carry: Any, i: Array) -> tuple[Any, None]:
        state, kept = carry
        state = step(state, i)
        if trajectory_length:
            slot = i * trajectory_length // count
            put = lambda rows, x: rows.at[slot].set(x)
            kept = jax.tree.map(put, kept, state)
        return (state, kept), None

    kept = jax.tree.map(empty, start) if trajectory_length else None
    (end, kept), _ = jax.lax.scan(body, (start, kept), jnp.arange(count))
    return end, kept


def add_scaled(x: PyTree[Array], *terms: tuple[Any, PyTree[Array]]) -> PyTree[Array]:
    """Returns x + the sum of weight * slope over trees; terms: (weight, slope), ..."""
    for weight, slope in terms:
        x = jax.tree.map(lambda a, s, w=weight: a + w * s, x, slope)
    return x


def weighted_sum(
    weights: Float[Array, " n"], slopes: PyTree[Float[Array, "m ..."]]
) -> PyTree[Array]:
    """Returns the sum of weights times the first n entries of each leaf.

    Not a dot, which a TPU or GPU would compute in fewer bits unless told otherwise.
    """
    like = lambda x: weights.reshape(-1, *[1] * (x.ndim - 1))  # (n, 1, ..., 1)
    total = lambda x: jnp.sum(like(x) * x[: len(weights)], axis=0)
    return jax.tree.map(total, slopes)


def rms_norm(tree: PyTree[Array]) -> Float[Array, ""]:
    """Returns the root mean square of the largest leaf, as torchdiffeq has it."""
    leaves = [jnp.sqrt(jnp.mean(leaf**2)) for leaf in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack(leaves))


def initial_step(
    slope: Slope,
    start: PyTree[Array],
    t0: float,
    t1: float,
    *,
    rtol: float,
    atol: float,
    order: int,
    longest: Any,
) -> tuple[PyTree[Array], Float[Array, ""]]:
    """Returns the slope at the start, and the size of the first step to try.

    Two evaluations. The size is not finite if the network is not.

    Source: Hairer, Noersett and Wanner, Solving Ordinary Differential Equations I,
    II.4.
    """
    sign = 1.0 if t1 > t0 else -1.0
    scale = jax.tree.map(lambda x: atol + rtol * jnp.abs(x), start)
    scaled = lambda x: rms_norm(jax.tree.map(jnp.divide, x, scale))

    def evaluate(at: Any, _: None) -> Any:  # in a loop: the network is compiled once
        here = slope(*at)
        d0, d1 = scaled(start), scaled(here)
        h = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        h = jnp.minimum(h, longest)
        return (t0 + sign * h, add_scaled(start, (sign * h, here))), (here, h, d1)

    _, (slopes, h, d1) = jax.lax.scan(evaluate, (jnp.float32(t0), start), length=2)
    first, second = (jax.tree.map(lambda x, i=i: x[i], slopes) for i in (0, 1))
    d2 = scaled(jax.tree.map(jnp.subtract, second, first)) / h[0]
    steepest = jnp.maximum(d1[0], d2)
    smallest = jnp.maximum(1e-6, 1e-3 * h[0])
    guess = jnp.where(steepest > 1e-15, (0.01 / steepest) ** (1 / order), smallest)
    return first, jnp.minimum(jnp.minimum(100 * h[0], guess), longest)


def check_ranges(sampler: Any, **ranges: Between) -> None:
    """Refuses a sampler's fields, named by the arguments, outside of their ranges."""
    for name, allowed in ranges.items():
        value = vars(sampler)[name]
        if value not in allowed:
            raise UserError(f"{name}={value}: {allowed}")
