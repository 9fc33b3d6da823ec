"""The probability-flow ODE with steps chosen to a tolerance, by diffrax.

A step control is a function (sampler, slope, start, t0, t1) -> (end, stats): over_batch
and per_image here, like_torchdiffeq in torchdiffeq.py. stats has "evaluations",
"accepted" and "rejected" steps, and "finished": False if max_steps came first or steps
became too short to go on, as with a network that is not finite; the data is then
unfinished. They are numbers, or [B] where each image has steps of its own.
"""

import dataclasses
from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from sit_jax.errors import UserError
from sit_jax.samplers.base import (
    check_trajectory_length,
    initial_step,
    integrate_probability_flow,
    rms_norm,
)


class Fehlberg2(diffrax.AbstractERK):
    """Fehlberg's method of second order with a first-order guess beside it."""

    tableau = diffrax.ButcherTableau(
        c=np.array([1 / 2, 1.0]),
        b_sol=np.array([1 / 512, 255 / 256, 1 / 512]),
        b_error=np.array([-1 / 512, 0.0, 1 / 512]),
        a_lower=(np.array([1 / 2]), np.array([1 / 256, 255 / 256])),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms):
        return 2


def batch_error_control(sampler, slope, start, t0, t1):
    """One error and one step size for the whole batch, on all devices."""
    solver, tableau = sampler.solver, sampler.solver.tableau
    first, dt = initial_step(
        slope,
        start,
        *(t0, t1, sampler.rtol, sampler.atol),
        order=solver.order(None),
        longest=abs(t1 - t0),
    )
    # what is not finite must not be the step, or the solver never gives up
    dt = jnp.where(dt > 0, dt, abs(t1 - t0)) * (1 if t1 > t0 else -1)
    save = {"end": diffrax.SubSaveAt(t1=True)}
    if sampler.frames:
        moments = np.linspace(t0, t1, sampler.frames + 1)[1:]
        save["way"] = diffrax.SubSaveAt(ts=moments)
    solution = _solved(
        slope,
        solver,
        *(t0, t1, dt, start),
        # a solver that keeps its last slope for the next step is given the first
        solver_state=(jnp.array(False), first) if tableau.fsal else None,
        stepsize_controller=diffrax.PIDController(
            sampler.rtol, sampler.atol, rms_norm, dtmin=1e-7, force_dtmin=False
        ),
        saveat=diffrax.SaveAt(subs=save),
        max_steps=sampler.max_steps,
        throw=False,
    )
    stats = _counts(solution, tableau.num_stages - tableau.fsal)
    if sampler.frames:
        stats["trajectory"] = solution.ys["way"]
    return jax.tree.map(lambda x: x[0], solution.ys["end"]), stats


def _solved(slope, *problem, **how):
    """diffrax's solution, with float32 products: Dopri5's interpolation asks for none.

    The network's are what its own precision says.
    """
    outside = jax.config.jax_default_matmul_precision

    def term(t, x, args):
        with jax.default_matmul_precision(outside):
            return slope(t, x)

    with jax.default_matmul_precision("highest"):
        return diffrax.diffeqsolve(diffrax.ODETerm(term), *problem, **how)


def per_sample_control(sampler, slope, start, t0, t1):
    """Each image in steps of its own, so that it does not depend on the others.

    The network still sees the whole batch at once, with a time for each image.
    """
    rows = len(jax.tree.leaves(start)[0])
    # vmap cannot look into what slope has captured (weights): it goes in openly
    traced, form = jax.make_jaxpr(slope, return_shape=True)(jnp.zeros(rows), start)
    form = jax.tree.structure(form)

    @jax.custom_batching.custom_vmap
    def one(t, x, captured):
        return x  # for its shape: what runs is the rule below

    @one.def_vmap
    def all_rows(count, batched, t, x, captured):
        t = jnp.broadcast_to(t, (count,))
        out = jax.core.eval_jaxpr(traced.jaxpr, captured, t, *jax.tree.leaves(x))
        return jax.tree.unflatten(form, out), jax.tree.map(lambda _: True, x)

    def solve(x):
        return batch_error_control(
            sampler, lambda t, x: one(jnp.float32(t), x, traced.consts), x, t0, t1
        )

    end, stats = jax.vmap(solve)(start)
    if "trajectory" in stats:  # time first, as everywhere
        swap = lambda x: jnp.swapaxes(x, 0, 1)
        stats["trajectory"] = jax.tree.map(swap, stats["trajectory"])
    return end, stats


@dataclasses.dataclass(frozen=True)
class AdaptiveODE:
    """Steps as long as the estimated error allows, by any explicit diffrax solver.

    reverse goes from data to noise; frames: see FixedStepODE, at evenly spaced
    times.
    """

    solver: diffrax.AbstractERK = diffrax.Dopri5()
    rtol: float = 1e-3
    atol: float = 1e-6
    control: Callable = batch_error_control
    max_steps: int = 4096
    reverse: bool = False
    frames: int = 0

    def __post_init__(self):
        if not isinstance(self.solver, diffrax.AbstractERK):
            raise UserError(
                f"solver={self.solver}: AdaptiveODE needs an explicit Runge-Kutta "
                "solver that estimates its error, such as diffrax.Dopri5()"
            )
        for name in ("rtol", "atol"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)}: give 0 or more")
        if self.rtol == self.atol == 0:
            raise UserError("rtol=0 and atol=0: one of them must be positive")
        if self.max_steps < 1:
            raise UserError(f"max_steps={self.max_steps}: give at least 1")
        check_trajectory_length(self.frames)

    def __call__(self, draw, process, net, noise):
        return integrate_probability_flow(self, process, net, noise)

    def solve(self, slope, start, t0, t1):
        """start: tree of arrays at t0 -> (the tree at t1, stats)."""
        return self.control(self, slope, start, t0, t1)


def _counts(solution, each):
    """diffrax's numbers of steps as our stats; each: evaluations of one step."""
    steps = solution.stats["num_steps"]
    stats = {
        "evaluations": 2 + steps * each,
        "accepted": solution.stats["num_accepted_steps"],
        "rejected": solution.stats["num_rejected_steps"],
    }
    stats = {name: jnp.asarray(n, jnp.int32) for name, n in stats.items()}
    stats["finished"] = solution.result == diffrax.RESULTS.successful
    return stats
