"""The probability-flow ODE, on a fixed grid or with steps chosen to a tolerance.

A sampler is sampler(draw, process, net, noise) -> (data, stats), all [B, H, W, C];
these are deterministic and never call draw. A slope is a function (t, x) -> dx/dt.
`solve` takes any tree of arrays, so that one sampler's settings serve whatever follows
the flow.

To add a method for fixed grids, write a function like heun.
"""

import dataclasses
from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

from sit_jax import predictions
from sit_jax.errors import UserError
from sit_jax.interpolant import require_path


def euler(slope, t, dt, x):
    return _add(x, dt, slope(t, x))


def heun(slope, t, dt, x):
    """The trapezoidal rule, with Euler's guess at the far end; torchdiffeq's heun2."""
    first = slope(t, x)
    second = slope(t + dt, _add(x, dt, first))
    return _add(_add(x, dt / 2, first), dt / 2, second)


@dataclasses.dataclass(frozen=True)
class Ode:
    """`steps` equal steps of a method; reverse goes from data to noise."""

    method: Callable = heun
    steps: int = 50
    reverse: bool = False

    def __post_init__(self):
        if self.steps < 1 or self.steps != int(self.steps):
            raise UserError(f"steps={self.steps}: Ode needs a whole number, at least 1")

    def __call__(self, draw, process, net, noise):
        return _flow(self, process, net, noise)

    def solve(self, slope, start, t0, t1):
        """start: tree of arrays at t0 -> (the tree at t1, stats)."""
        grid = np.linspace(t0, t1, self.steps + 1).astype(np.float32)

        def step(x, at):
            return self.method(slope, *at, x), None

        end, _ = jax.lax.scan(step, start, (grid[:-1], np.diff(grid)))
        return end, {"evaluations": jnp.int32(self.steps * _calls(self.method))}


@dataclasses.dataclass(frozen=True)
class AdaptiveOde:
    """Steps as long as the estimated error allows, by any explicit diffrax solver.

    The error is one root mean square over the whole batch. stats also has "accepted"
    and "rejected" steps, and "finished": False if max_steps came first or steps became
    too short to go on, as with a network that is not finite; data is then unfinished.
    """

    solver: diffrax.AbstractERK = diffrax.Dopri5()
    rtol: float = 1e-3
    atol: float = 1e-6
    max_steps: int = 4096
    reverse: bool = False

    def __post_init__(self):
        if not isinstance(self.solver, diffrax.AbstractERK):
            raise UserError(
                f"solver={self.solver}: AdaptiveOde needs an explicit Runge-Kutta "
                "solver that estimates its error, such as diffrax.Dopri5()"
            )
        for name in ("rtol", "atol"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)}: give 0 or more")
        if self.rtol == self.atol == 0:
            raise UserError("rtol=0 and atol=0: one of them must be positive")
        if self.max_steps < 1:
            raise UserError(f"max_steps={self.max_steps}: give at least 1")

    def __call__(self, draw, process, net, noise):
        return _flow(self, process, net, noise)

    def solve(self, slope, start, t0, t1):
        """start: tree of arrays at t0 -> (the tree at t1, stats)."""
        first, dt = self._first_step(slope, start, t0, t1)
        tableau = self.solver.tableau
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, x, args: slope(t, x)),
            self.solver,
            t0,
            t1,
            dt,
            start,
            # a solver that keeps its last slope for the next step is given the first
            solver_state=(jnp.array(False), first) if tableau.fsal else None,
            stepsize_controller=diffrax.PIDController(
                self.rtol, self.atol, _rms, dtmin=1e-7, force_dtmin=False
            ),
            max_steps=self.max_steps,
            throw=False,
        )
        steps = solution.stats["num_steps"]
        stats = {
            "evaluations": 2 + steps * (tableau.num_stages - tableau.fsal),
            "accepted": solution.stats["num_accepted_steps"],
            "rejected": solution.stats["num_rejected_steps"],
        }
        stats = {name: jnp.asarray(n, jnp.int32) for name, n in stats.items()}
        stats["finished"] = solution.result == diffrax.RESULTS.successful
        return jax.tree.map(lambda x: x[0], solution.ys), stats

    def _first_step(self, slope, start, t0, t1):
        """-> slope at the start, and the first step to try: two evaluations.

        Hairer, Noersett and Wanner, Solving Ordinary Differential Equations I, II.4;
        diffrax 0.7 would begin with 0.01 whatever the slope.
        """
        sign, longest = (1.0 if t1 > t0 else -1.0), abs(t1 - t0)
        scale = jax.tree.map(lambda x: self.atol + self.rtol * jnp.abs(x), start)
        scaled = lambda x: _rms(jax.tree.map(jnp.divide, x, scale))

        def look(at, _):  # in a loop, so that the network is compiled once
            here = slope(*at)
            d0, d1 = scaled(start), scaled(here)
            h = jnp.where((d0 < 1e-5) | (d1 < 1e-5), 1e-6, 0.01 * d0 / d1)
            h = jnp.minimum(h, longest)
            return (t0 + sign * h, _add(start, sign * h, here)), (here, h, d1)

        _, (seen, h, d1) = jax.lax.scan(look, (jnp.float32(t0), start), length=2)
        first, second = (jax.tree.map(lambda x, i=i: x[i], seen) for i in (0, 1))
        d2 = scaled(jax.tree.map(jnp.subtract, second, first)) / h[0]
        steepest, order = jnp.maximum(d1[0], d2), self.solver.order(None)
        smallest = jnp.maximum(1e-6, 1e-3 * h[0])
        guess = jnp.where(steepest > 1e-15, (0.01 / steepest) ** (1 / order), smallest)
        dt = jnp.minimum(jnp.minimum(100 * h[0], guess), longest)
        # what is not finite must not be the step, or the solver never gives up
        return first, sign * jnp.where(dt > 0, dt, longest)


def _flow(sampler, process, net, noise):
    require_path(sampler, process)
    velocity = process.field(net, predictions.velocity)

    def slope(t, x):
        return velocity(x, jnp.full(x.shape[:1], t, jnp.float32))

    start = noise.astype(jnp.float32)
    return sampler.solve(slope, start, *process.span(reverse=sampler.reverse))


def _add(x, dt, slope):
    return jax.tree.map(lambda x, s: x + dt * s, x, slope)


def _rms(tree):
    leaves = jax.tree.leaves(tree)
    square = sum(jnp.sum(leaf**2) for leaf in leaves)
    return jnp.sqrt(square / sum(leaf.size for leaf in leaves))


def _calls(method):
    """Evaluations in one step of a method: counted, so they need no declaring."""
    calls = []
    method(lambda t, x: calls.append(t) or x, 0.0, 1.0, 0.0)
    return len(calls)
