"""The steps that torchdiffeq 0.2.5 takes, and so those of the released SiT sampler.

Its choices: one error over all that is integrated, which with guidance includes the
null half (`doubled`); a step is never shortened at the end, so that the network is
asked beyond it and the answer is read from the quartic through the last step; the last
stage's slope begins the next step also where the method does not make them the same.
Time is float32 here, float64 there.
"""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.errors import UserError
from sit_jax.samplers.base import add_scaled, initial_step, rms_norm, weighted_sum

SAFETY, SLOWEST, FASTEST = 0.9, 0.2, 10.0
# Weights of the stages' slopes in the state half a step on.
HALFWAY = {
    "Heun": (1 / 2, 0),
    "Fehlberg2": (0, 1 / 2, 0),
    "Bosh3": (0, 1 / 2, 0, 0),
    "Dopri5": np.asarray(diffrax.Dopri5.interpolation_cls.c_mid),
    "Dopri8": [
        np.polyval(c, 0.5) / 2 for c in diffrax.Dopri8.interpolation_cls.eval_coeffs
    ],
}


def torchdiffeq_control(sampler, slope, start, t0, t1):
    """start: tree of arrays at t0 -> (the tree at t1, stats)."""
    sign, span = 1.0 if t1 > t0 else -1.0, abs(t1 - t0)
    # s rises from 0
    forward = lambda s, x: jax.tree.map(lambda v: sign * v, slope(t0 + sign * s, x))
    order = sampler.solver.order(None)
    here, dt = initial_step(
        forward, start, 0.0, 1.0, sampler.rtol, sampler.atol, order, jnp.inf
    )
    moments = jnp.asarray(span * np.linspace(0, 1, max(sampler.frames, 1) + 1)[1:])
    keep = lambda x: jnp.broadcast_to(x, (len(moments), *x.shape))
    begin = {
        "s": jnp.float32(0),
        "dt": dt,
        "x": start,
        "slope": here,
        "seen": jax.tree.map(keep, start),
        "accepted": jnp.int32(0),
        "rejected": jnp.int32(0),
    }

    def going(state):
        s, dt, steps = state["s"], state["dt"], state["accepted"] + state["rejected"]
        return (s < span) & (s + dt > s) & (steps < sampler.max_steps)

    step = _step(sampler, forward, moments, _halfway(sampler.solver))
    return _ended(sampler, jax.lax.while_loop(going, step, begin), span)


def _step(sampler, slope, moments, halfway):
    """-> state -> state: a step tried, and taken if its error is small enough."""
    order = sampler.solver.order(None)

    def step(state):
        s, dt, x, k0 = (state[name] for name in ("s", "dt", "x", "slope"))
        stages, ahead, error = _stages(sampler.solver.tableau, slope, s, dt, x, k0)
        ratio = _ratio(sampler, error, x, ahead)
        good = ratio <= 1
        middle = add_scaled(x, (1.0, weighted_sum(dt * halfway, stages)))
        last = jax.tree.map(lambda k: k[-1], stages)
        place = (moments - s) / dt
        read = jax.vmap(_quartic(x, ahead, middle, k0, last, dt))(place)
        passed = good & (place > 0) & (place <= 1)
        return {
            "s": jnp.where(good, s + dt, s),
            "dt": dt * _factor(ratio, order),
            "x": _where(good, ahead, x),
            "slope": _where(good, last, k0),
            "seen": _where(passed, read, state["seen"]),
            "accepted": state["accepted"] + good,
            "rejected": state["rejected"] + ~good,
        }

    return step


def _ratio(sampler, error, x, ahead):
    """The estimated error over what the tolerances allow."""
    allowed = lambda a, b: (
        sampler.atol + sampler.rtol * jnp.maximum(jnp.abs(a), jnp.abs(b))
    )
    return rms_norm(jax.tree.map(lambda e, a, b: e / allowed(a, b), error, x, ahead))


def _factor(ratio, order):
    """What the next step is to this one."""
    slowest = jnp.where(ratio < 1, 1.0, SLOWEST)
    factor = jnp.clip(SAFETY * ratio ** (-1 / order), slowest, FASTEST)
    return jnp.where(ratio == 0, FASTEST, factor)


def _where(flags, new, old):
    """flags [] or [frames], over trees."""
    return jax.tree.map(lambda a, b: jnp.where(_like(flags, a), a, b), new, old)


def _ended(sampler, state, span):
    """-> the state at the end, or where the steps ended before it, and stats."""
    finished = state["s"] >= span
    last = jax.tree.map(
        lambda seen, x: jnp.where(finished, seen[-1], x), state["seen"], state["x"]
    )
    steps = state["accepted"] + state["rejected"]
    stats = {
        "evaluations": 2 + steps * (sampler.solver.tableau.num_stages - 1),
        "accepted": state["accepted"],
        "rejected": state["rejected"],
        "finished": finished,
    }
    if sampler.frames:
        stats["trajectory"] = state["seen"]
    return last, stats


torchdiffeq_control.doubled = True  # wants guidance's null half beside the batch


def _stages(tableau, slope, s, dt, x, first):
    """-> slopes of the stages [stages, ...], the state a step on, its estimated error.

    The stages are a loop, so that the network is compiled once.
    """
    count = tableau.num_stages
    lower = np.zeros((count, count), np.float32)
    for i, weights in enumerate(tableau.a_lower):
        lower[i + 1, : i + 1] = weights
    lower, c = jnp.asarray(lower), jnp.asarray(np.append(0, tableau.c), jnp.float32)

    def stage(slopes, i):
        at = jnp.where(c[i] == 1, jnp.nextafter(s + dt, -jnp.inf), s + c[i] * dt)
        guess = add_scaled(x, (1.0, weighted_sum(dt * lower[i], slopes)))
        put = lambda row, new: row.at[i].set(new)
        return jax.tree.map(put, slopes, slope(at, guess)), None

    start = jax.tree.map(lambda k: jnp.zeros((count, *k.shape)).at[0].set(k), first)
    slopes, _ = jax.lax.scan(stage, start, jnp.arange(1, count))
    weights = lower[-1] if tableau.fsal else jnp.asarray(tableau.b_sol, jnp.float32)
    ahead = add_scaled(x, (1.0, weighted_sum(dt * weights, slopes)))
    error = weighted_sum(dt * jnp.asarray(tableau.b_error, jnp.float32), slopes)
    return slopes, ahead, error


def _quartic(x, ahead, middle, first, last, dt):
    """-> the polynomial through three states with two slopes, place in [0, 1] -> x."""

    def coefficients(x, ahead, middle, first, last):
        a = 2 * dt * (last - first) - 8 * (ahead + x) + 16 * middle
        b = dt * (5 * first - 3 * last) + 18 * x + 14 * ahead - 32 * middle
        c = dt * (last - 4 * first) - 11 * x - 5 * ahead + 16 * middle
        return x, dt * first, c, b, a

    table = jax.tree.map(coefficients, x, ahead, middle, first, last)
    is_row = lambda node: isinstance(node, tuple) and len(node) == 5

    def read(place):
        value = lambda row: sum(c * place**i for i, c in enumerate(row))
        return jax.tree.map(value, table, is_leaf=is_row)

    return read


def _like(flags, x):
    """Flags with as many axes as x, of which the first is theirs."""
    return flags.reshape(flags.shape + (1,) * (x.ndim - flags.ndim))


def _halfway(solver):
    name = type(solver).__name__
    if name not in HALFWAY:
        raise UserError(
            f"{name} is none of torchdiffeq's solvers ({', '.join(HALFWAY)}); "
            "take --step-control global"
        )
    return jnp.asarray(np.asarray(HALFWAY[name]), jnp.float32)
