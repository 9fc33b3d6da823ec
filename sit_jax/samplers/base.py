"""A known number of steps, and the states kept on the way."""

import jax
import jax.numpy as jnp

from sit_jax.diffusion import predictions
from sit_jax.errors import UserError


def require_continuous(sampler, process):
    """Refuses a process in which time is not continuous, naming what fits it."""
    if not hasattr(process, "field"):
        raise UserError(
            f"{type(sampler).__name__} samples an Interpolant; "
            f"{type(process).__name__} has no continuous path: use DDPM "
            "or DDIM (--sampler ddpm, ddim)"
        )


def run_steps(step, start, count, frames=0):
    """step(state, i) -> state, for i in 0 .. count - 1.

    -> (end, stats): with frames > 0, stats["trajectory"] holds that many states, tree
    of [frames, ...], evenly spread over the steps; the last of them is the end.
    """
    if frames > count:
        raise UserError(f"frames={frames}: there are only {count} steps to show")
    slots = lambda x: jnp.zeros((frames, *x.shape), x.dtype)

    def body(carry, i):
        state, kept = carry
        state = step(state, i)
        if frames:
            put = lambda slot, x: slot.at[i * frames // count].set(x)
            kept = jax.tree.map(put, kept, state)
        return (state, kept), None

    carry = start, jax.tree.map(slots, start) if frames else None
    (end, kept), _ = jax.lax.scan(body, carry, jnp.arange(count))
    return end, {"trajectory": kept} if frames else {}


def check_steps(sampler, steps, at_least=1):
    """Refuses a number of steps, or of frames, that is none."""
    if steps < at_least or steps != int(steps):
        why = " here" if at_least > 1 else ""
        raise UserError(f"steps={steps}: a whole number, at least {at_least}{why}")
    check_trajectory_length(sampler.frames)


def check_trajectory_length(frames):
    if frames < 0 or frames != int(frames):
        raise UserError(f"frames={frames}: 0 keeps none, else a whole number")


def integrate_probability_flow(sampler, process, net, noise):
    """-> (data, stats): sampler.solve from the process's start to its end."""
    require_continuous(sampler, process)
    velocity = process.field(net, predictions.velocity)

    def slope(t, x):
        return velocity(x, jnp.broadcast_to(jnp.float32(t), x.shape[:1]))

    start = noise.astype(jnp.float32)
    return sampler.solve(slope, start, *process.span(reverse=sampler.reverse))


def add_scaled(x, *terms):
    """x + the sum of weight * slope, over trees; terms: (weight, slope), ..."""
    for weight, slope in terms:
        x = jax.tree.map(lambda a, s, w=weight: a + w * s, x, slope)
    return x


def weighted_sum(weights, slopes):
    """The sum of weights [n] times the first n of each leaf's leading axis.

    Not a dot, which a TPU or GPU would compute in fewer bits unless told otherwise.
    """
    like = lambda x: weights.reshape(-1, *[1] * (x.ndim - 1))
    total = lambda x: jnp.sum(like(x) * x[: len(weights)], axis=0)
    return jax.tree.map(total, slopes)


def rms_norm(tree):
    """The root mean square of a tree's largest leaf, as torchdiffeq measures tuples."""
    leaves = [jnp.sqrt(jnp.mean(leaf**2)) for leaf in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack(leaves))


def initial_step(slope, start, t0, t1, rtol, atol, order, longest):
    """-> slope at the start, and the size of the first step to try: two evaluations.

    Hairer, Noersett and Wanner, Solving Ordinary Differential Equations I, II.4. The
    guess is not finite if the network is not.
    """
    sign = 1.0 if t1 > t0 else -1.0
    scale = jax.tree.map(lambda x: atol + rtol * jnp.abs(x), start)
    scaled = lambda x: rms_norm(jax.tree.map(jnp.divide, x, scale))

    def look(at, _):  # in a loop, so that the network is compiled once
        here = slope(*at)
        d0, d1 = scaled(start), scaled(here)
        h = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
        h = jnp.minimum(h, longest)
        return (t0 + sign * h, add_scaled(start, (sign * h, here))), (here, h, d1)

    _, (seen, h, d1) = jax.lax.scan(look, (jnp.float32(t0), start), length=2)
    first, second = (jax.tree.map(lambda x, i=i: x[i], seen) for i in (0, 1))
    d2 = scaled(jax.tree.map(jnp.subtract, second, first)) / h[0]
    steepest = jnp.maximum(d1[0], d2)
    smallest = jnp.maximum(1e-6, 1e-3 * h[0])
    guess = jnp.where(steepest > 1e-15, (0.01 / steepest) ** (1 / order), smallest)
    return first, jnp.minimum(jnp.minimum(100 * h[0], guess), longest)
