"""A known number of steps, and the states kept on the way."""

import jax
import jax.numpy as jnp

from sit_jax.errors import UserError


def walk(step, start, count, frames=0):
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
    check_frames(sampler.frames)


def check_frames(frames):
    if frames < 0 or frames != int(frames):
        raise UserError(f"frames={frames}: 0 keeps none, else a whole number")
