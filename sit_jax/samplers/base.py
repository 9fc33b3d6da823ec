"""What all samplers share: their result, a loop that keeps states, and checks.

A sampler is a frozen dataclass, called as sampler(net, process, noise, step_noise). It
draws nothing itself: step_noise(i) is the noise of step i. See typing.Sampler.

An ODE sampler also has solve(slope, start, t0, t1), which follows any initial value
problem. A slope is a function (t, x) -> dx/dt, where t is a number or [b], and x a tree
of arrays [b, ...].
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from sit_jax.diffusion import predictions
from sit_jax.errors import UserError
from sit_jax.typing import (
    Batch,
    ContinuousProcess,
    DiscreteProcess,
    Net,
    ODESampler,
    Process,
    Slope,
    StepNoise,
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(
        *("data", "num_evaluations", "num_accepted", "num_rejected"),
        *("finished", "trajectory"),
    ),
    meta_fields=(),
)
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


def integrate_probability_flow(
    sampler: ODESampler, net: Net, process: Process, noise: Batch, *, reverse: bool
) -> SamplerResult:
    """Follows the probability-flow ODE from the process's start to its end."""
    continuous = require_continuous(sampler, process)
    velocity = continuous.prediction_fn(net, predictions.velocity)

    def slope(t: Any, x: Batch) -> Batch:
        return velocity(x, jnp.broadcast_to(jnp.float32(t), x.shape[:1]))

    start = noise.astype(jnp.float32)
    return sampler.solve(slope, start, *continuous.time_interval(reverse=reverse))


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


def check_steps(steps: float, trajectory_length: float, at_least: int = 1) -> None:
    """Refuses a number of steps, or of states to keep, that is none."""
    if steps < at_least or steps != int(steps):
        why = " here" if at_least > 1 else ""
        raise UserError(f"steps={steps}: a whole number, at least {at_least}{why}")
    check_trajectory_length(trajectory_length)


def check_trajectory_length(length: float) -> None:
    """Refuses a number of states to keep that is none."""
    if length < 0 or length != int(length):
        raise UserError(
            f"trajectory_length={length}: 0 keeps none, else a whole number"
        )


def check_tolerance(name: str, value: float) -> None:
    """Refuses a negative tolerance."""
    if not value >= 0:
        raise UserError(f"{name}={value}: give 0 or more")
