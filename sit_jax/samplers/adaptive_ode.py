"""The probability-flow ODE with steps chosen to a tolerance, by diffrax.

A step control says how errors are measured and steps chosen: batch_error_control and
per_sample_control here, torchdiffeq_control in torchdiffeq.py. The result counts
accepted and rejected steps; `finished` is False if max_steps came first or steps became
too short to go on, as with a network that is not finite. The data is then unfinished.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, cast

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from sit_jax.errors import UserError
from sit_jax.samplers.base import (
    NUM_STATES,
    NUM_STEPS,
    TOLERANCE,
    ProbabilityFlowODE,
    SamplerResult,
    check_ranges,
    initial_step,
    rms_norm,
)
from sit_jax.typing import NamedFunction, Slope


class Fehlberg2(diffrax.AbstractERK):
    """Fehlberg's method of second order with a first-order guess beside it."""

    tableau = diffrax.ButcherTableau(
        c=np.array([1 / 2, 1.0]),
        b_sol=np.array([1 / 512, 255 / 256, 1 / 512]),
        b_error=np.array([-1 / 512, 0.0, 1 / 512]),
        a_lower=(np.array([1 / 2]), np.array([1 / 256, 255 / 256])),
    )
    interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

    def order(self, terms: Any) -> int:
        """Returns 2."""
        return 2


@dataclasses.dataclass(frozen=True, repr=False)
class StepControl(NamedFunction):
    """A function (sampler, slope, start, t0, t1) -> SamplerResult.

    Attributes:
      integrates_null_half: its errors are also of guidance's unconditional half, which
        is then integrated beside the batch, as in the originals.
    """

    integrates_null_half: bool = False


@StepControl
def batch_error_control(
    sampler: "AdaptiveODE", slope: Slope, start: Any, t0: float, t1: float
) -> SamplerResult:
    """Takes one error and one step size for the whole batch, on all devices."""
    solver, tableau = sampler.solver, cast(Any, sampler.solver.tableau)
    first, dt = initial_step(
        slope,
        start,
        t0,
        t1,
        rtol=sampler.rtol,
        atol=sampler.atol,
        order=cast(int, solver.order(None)),
        longest=abs(t1 - t0),
    )
    # what is not finite must not be the step, or the solver never gives up
    dt = jnp.where(dt > 0, dt, abs(t1 - t0)) * (1 if t1 > t0 else -1)
    save = {"end": diffrax.SubSaveAt(t1=True)}
    if sampler.trajectory_length:
        times = np.linspace(t0, t1, sampler.trajectory_length + 1)[1:]
        save["trajectory"] = diffrax.SubSaveAt(ts=jnp.asarray(times))
    term = diffrax.ODETerm(_with_own_precision(slope))
    with jax.default_matmul_precision("highest"):  # of Dopri5's interpolation
        solution = diffrax.diffeqsolve(
            term,
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
    count = lambda name: jnp.asarray(solution.stats[name], jnp.int32)
    return SamplerResult(
        data=jax.tree.map(lambda x: x[0], solution.ys["end"]),
        num_evaluations=2 + count("num_steps") * (tableau.num_stages - tableau.fsal),
        num_accepted=count("num_accepted_steps"),
        num_rejected=count("num_rejected_steps"),
        finished=solution.result == diffrax.RESULTS.successful,
        trajectory=solution.ys.get("trajectory"),
    )


def _with_own_precision(slope: Slope) -> Callable:
    """Returns a term whose products are as precise as they are outside of diffrax."""
    outside = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]

    def term(t: Any, x: Any, args: Any) -> Any:
        with jax.default_matmul_precision(outside):
            return slope(t, x)

    return term


@StepControl
def per_sample_control(
    sampler: "AdaptiveODE", slope: Slope, start: Any, t0: float, t1: float
) -> SamplerResult:
    """Takes each image in steps of its own, so that it does not depend on the others.

    The network still sees the whole batch at once, with a time for each image.
    """
    rows = len(jax.tree.leaves(start)[0])
    # vmap cannot look into what slope has captured (weights): it goes in openly
    jaxpr, shapes = jax.make_jaxpr(slope, return_shape=True)(jnp.zeros(rows), start)
    structure = jax.tree.structure(shapes)

    @jax.custom_batching.custom_vmap
    def one(t: Array, x: Any, captured: Any) -> Any:
        return x  # for its shape: what runs is the rule below

    @one.def_vmap
    def all_rows(size: int, batched: Any, t: Array, x: Any, captured: Any) -> Any:
        t = jnp.broadcast_to(t, (size,))
        out = jax.core.eval_jaxpr(jaxpr.jaxpr, captured, t, *jax.tree.leaves(x))
        return jax.tree.unflatten(structure, out), jax.tree.map(lambda _: True, x)

    def solve(x: Any) -> SamplerResult:
        row_slope = lambda t, x: one(jnp.float32(t), x, jaxpr.consts)
        return batch_error_control(sampler, row_slope, x, t0, t1)

    result = jax.vmap(solve)(start)
    swap = lambda x: jnp.swapaxes(x, 0, 1)  # time first, as everywhere
    return dataclasses.replace(result, trajectory=jax.tree.map(swap, result.trajectory))


@dataclasses.dataclass(frozen=True)
class AdaptiveODE(ProbabilityFlowODE):
    """Steps as long as the estimated error allows, by any explicit diffrax solver.

    Attributes:
      solver: with an error estimate.
      rtol, atol: tolerances.
      control: a StepControl.
      max_steps: after which the solver gives up.
      reverse: from data to noise.
      trajectory_length: how many states on the way to keep, at evenly spaced times.
    """

    solver: diffrax.AbstractERK = diffrax.Dopri5()
    rtol: float = 1e-3
    atol: float = 1e-6
    control: StepControl = batch_error_control
    max_steps: int = 4096
    reverse: bool = False
    trajectory_length: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.solver, diffrax.AbstractERK):
            raise UserError(
                f"solver={self.solver}: AdaptiveODE needs an explicit Runge-Kutta "
                "solver that estimates its error, such as diffrax.Dopri5()"
            )
        check_ranges(self, rtol=TOLERANCE, atol=TOLERANCE, max_steps=NUM_STEPS)
        check_ranges(self, trajectory_length=NUM_STATES)
        if self.rtol == self.atol == 0:
            raise UserError("rtol=0 and atol=0: one of them must be positive")

    @property
    def integrates_null_half(self) -> bool:
        """Whether guidance's unconditional half is integrated beside the batch."""
        return self.control.integrates_null_half

    def solve(
        self, slope: Slope, start: PyTree[Array], t0: float, t1: float
    ) -> SamplerResult:
        """Follows a slope from a tree of arrays at t0 to t1."""
        return self.control(self, slope, start, t0, t1)
