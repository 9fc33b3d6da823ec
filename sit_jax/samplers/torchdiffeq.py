"""The steps that torchdiffeq 0.2.5 takes, and so those of the released SiT sampler.

Its choices: one error over all that is integrated, which with guidance includes the
unconditional half; a step is never shortened at the end, so that the network is asked
beyond it and the answer is read from the quartic through the last step; the last
stage's slope begins the next step also where the method does not make them the same.
Time is float32 here, float64 there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from sit_jax.errors import UserError
from sit_jax.samplers.adaptive_ode import AdaptiveODE, StepControl
from sit_jax.samplers.base import (
    SamplerResult,
    add_scaled,
    initial_step,
    rms_norm,
    weighted_sum,
)
from sit_jax.typing import Slope

SAFETY, MIN_FACTOR, MAX_FACTOR = 0.9, 0.2, 10.0
# Weights of the stages' slopes in the state half a step on.
MIDPOINT_WEIGHTS = {
    "Heun": (1 / 2, 0),
    "Fehlberg2": (0, 1 / 2, 0),
    "Bosh3": (0, 1 / 2, 0, 0),
    "Dopri5": np.asarray(cast(Any, diffrax.Dopri5.interpolation_cls).c_mid),
    "Dopri8": [
        np.polyval(c, 0.5) / 2
        for c in cast(Any, diffrax.Dopri8.interpolation_cls).eval_coeffs
    ],
}


class State(NamedTuple):
    """Where the loop is; s rises from 0, whatever the direction of time."""

    s: Float[Array, ""]
    dt: Float[Array, ""]
    x: PyTree[Array]
    slope: PyTree[Array]
    outputs: PyTree[Array]  # states at the times asked for
    accepted: Int[Array, ""]
    rejected: Int[Array, ""]


@partial(StepControl, integrates_null_half=True)
def torchdiffeq_control(
    sampler: AdaptiveODE, slope: Slope, start: Any, t0: float, t1: float
) -> SamplerResult:
    """Takes torchdiffeq's steps from a tree of arrays at t0 to t1."""
    midpoint_weights = _midpoint_weights(sampler.solver)
    sign, span = 1.0 if t1 > t0 else -1.0, abs(t1 - t0)
    forward = lambda s, x: jax.tree.map(lambda v: sign * v, slope(t0 + sign * s, x))
    first, dt = initial_step(
        forward,
        start,
        0.0,
        1.0,
        rtol=sampler.rtol,
        atol=sampler.atol,
        order=cast(int, sampler.solver.order(None)),
        longest=jnp.inf,
    )
    count = max(sampler.trajectory_length, 1)
    times = jnp.asarray(span * np.linspace(0, 1, count + 1)[1:])
    repeat = lambda x: jnp.broadcast_to(x, (count, *x.shape))
    begin = State(
        s=jnp.float32(0),
        dt=dt,
        x=start,
        slope=first,
        outputs=jax.tree.map(repeat, start),
        accepted=jnp.int32(0),
        rejected=jnp.int32(0),
    )

    def go_on(state: State) -> Bool[Array, ""]:
        steps = state.accepted + state.rejected
        can_move = state.s + state.dt > state.s
        return (state.s < span) & can_move & (steps < sampler.max_steps)

    step = partial(_try_step, sampler, forward, times, midpoint_weights)
    end = jax.lax.while_loop(go_on, step, begin)
    finished = end.s >= span
    # where the steps ended before the end, it is the state that they came to
    last = lambda output, x: jnp.where(finished, output[-1], x)
    stages = cast(Any, sampler.solver.tableau).num_stages
    return SamplerResult(
        data=jax.tree.map(last, end.outputs, end.x),
        num_evaluations=2 + (end.accepted + end.rejected) * (stages - 1),
        num_accepted=end.accepted,
        num_rejected=end.rejected,
        finished=finished,
        trajectory=end.outputs if sampler.trajectory_length else None,
    )


def _try_step(
    sampler: AdaptiveODE, slope: Slope, times: Array, midpoint: Array, state: State
) -> State:
    """Tries a step, and takes it if its error is small enough."""
    s, dt, x, k0 = state.s, state.dt, state.x, state.slope
    stages, ahead, error = _stages(sampler.solver.tableau, slope, s, dt, x, k0)
    ratio = _error_ratio(sampler, error, x, ahead)
    accept = ratio <= 1
    middle = add_scaled(x, (1.0, weighted_sum(dt * midpoint, stages)))
    last = jax.tree.map(lambda k: k[-1], stages)
    position = (times - s) / dt  # of the times asked for, in this step
    quartic = _quartic(x, ahead, middle, k0, last, dt)
    passed = accept & (position > 0) & (position <= 1)
    return State(
        s=jnp.where(accept, s + dt, s),
        dt=dt * _step_factor(ratio, cast(int, sampler.solver.order(None))),
        x=_where(accept, ahead, x),
        slope=_where(accept, last, k0),
        outputs=_where(passed, jax.vmap(quartic)(position), state.outputs),
        accepted=state.accepted + accept,
        rejected=state.rejected + ~accept,
    )


def _error_ratio(sampler: AdaptiveODE, error: Any, x: Any, ahead: Any) -> Array:
    """Returns the estimated error over what the tolerances allow."""
    allowed = lambda a, b: (
        sampler.atol + sampler.rtol * jnp.maximum(jnp.abs(a), jnp.abs(b))
    )
    return rms_norm(jax.tree.map(lambda e, a, b: e / allowed(a, b), error, x, ahead))


def _step_factor(ratio: Array, order: int) -> Array:
    """Returns the size of the next step over the size of this one."""
    smallest = jnp.where(ratio < 1, 1.0, MIN_FACTOR)
    factor = jnp.clip(SAFETY * ratio ** (-1 / order), smallest, MAX_FACTOR)
    return jnp.where(ratio == 0, MAX_FACTOR, factor)


def _where(flags: Bool[Array, "..."], new: Any, old: Any) -> Any:
    """Chooses between trees by flags, [] or one for each row of the leaves."""
    expand = lambda x: flags.reshape(flags.shape + (1,) * (x.ndim - flags.ndim))
    return jax.tree.map(lambda a, b: jnp.where(expand(a), a, b), new, old)


def _stages(
    tableau: Any, slope: Slope, s: Array, dt: Array, x: Any, first: Any
) -> tuple[Any, Any, Any]:
    """Returns slopes [stages, ...], the state a step on, and its estimated error.

    The stages are a loop, so that the network is compiled once.
    """
    count = tableau.num_stages
    rows = np.zeros((count, count), np.float32)
    for i, weights in enumerate(tableau.a_lower):
        rows[i + 1, : i + 1] = weights
    lower, c = jnp.asarray(rows), jnp.asarray(np.append(0, tableau.c), jnp.float32)

    def stage(slopes: Any, i: Array) -> tuple[Any, None]:
        t = jnp.where(c[i] == 1, jnp.nextafter(s + dt, -jnp.inf), s + c[i] * dt)
        guess = add_scaled(x, (1.0, weighted_sum(dt * lower[i], slopes)))
        put = lambda row, new: row.at[i].set(new)
        return jax.tree.map(put, slopes, slope(t, guess)), None

    start = jax.tree.map(lambda k: jnp.zeros((count, *k.shape)).at[0].set(k), first)
    slopes, _ = jax.lax.scan(stage, start, jnp.arange(1, count))
    weights = lower[-1] if tableau.fsal else jnp.asarray(tableau.b_sol, jnp.float32)
    ahead = add_scaled(x, (1.0, weighted_sum(dt * weights, slopes)))
    error = weighted_sum(dt * jnp.asarray(tableau.b_error, jnp.float32), slopes)
    return slopes, ahead, error


def _quartic(
    x: Any, ahead: Any, middle: Any, first: Any, last: Any, dt: Array
) -> Callable[[Array], Any]:
    """Returns the polynomial through three states with two slopes, of [0, 1]."""

    def coefficients(x: Any, ahead: Any, middle: Any, first: Any, last: Any) -> tuple:
        a = 2 * dt * (last - first) - 8 * (ahead + x) + 16 * middle
        b = dt * (5 * first - 3 * last) + 18 * x + 14 * ahead - 32 * middle
        c = dt * (last - 4 * first) - 11 * x - 5 * ahead + 16 * middle
        return x, dt * first, c, b, a

    table = jax.tree.map(coefficients, x, ahead, middle, first, last)
    is_row = lambda node: isinstance(node, tuple) and len(node) == 5

    def evaluate(position: Array) -> Any:
        value = lambda row: sum(c * position**i for i, c in enumerate(row))
        return jax.tree.map(value, table, is_leaf=is_row)

    return evaluate


def _midpoint_weights(solver: diffrax.AbstractERK) -> Array:
    name = type(solver).__name__
    if name not in MIDPOINT_WEIGHTS:
        raise UserError(
            f"{name} is none of torchdiffeq's solvers ({', '.join(MIDPOINT_WEIGHTS)}); "
            "take --step-control global"
        )
    return jnp.asarray(np.asarray(MIDPOINT_WEIGHTS[name]), jnp.float32)
