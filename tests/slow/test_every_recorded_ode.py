"""All recorded ODE runs; tests/test_ode_recorded.py has one of each kind."""

import numpy as np
import pytest
from helpers.samplers import RUNS, SOLVERS, G, compare_adaptive, compare_fixed, replayed

from sit_jax.samplers.adaptive_ode import AdaptiveODE
from sit_jax.samplers.torchdiffeq import torchdiffeq_control

# r42 broke off in the original; r49 goes back from time 1, where VP has no noise and
# the original divides by it
WHOLE = {name: run for name, run in RUNS.items() if name not in ("r42", "r49")}
FIXED = [name for name, run in WHOLE.items() if "n_accepted" not in run]
# Their first step is so small that its estimated error is rounding of the network's
# output, 6e-6 to 1.1e-5 of what is tolerated, and just there decides whether the next
# step is ten times as long, the most there is, or 9.4 times.
BY_ROUNDING = ("r16", "r23")


@pytest.mark.parametrize("name", FIXED)
def test_fixed_grids(name):
    compare_fixed(name)


@pytest.mark.parametrize("name", sorted(set(WHOLE) - set(FIXED) - set(BY_ROUNDING)))
def test_adaptive_steps(name):
    compare_adaptive(name)


@pytest.mark.parametrize("name", BY_ROUNDING)
def test_steps_that_rounding_chose_are_as_good(name):
    run = RUNS[name]
    how = {"rtol": run["rtol"], "atol": run["atol"], "reverse": run["reverse"]}
    sampler = AdaptiveODE(SOLVERS[run["method"]], control=torchdiffeq_control, **how)
    data, _ = replayed(run, sampler)
    exact = G[run["exact"]][:2]
    theirs = np.abs(G[f"{name}.final"][:2] - exact).max()
    assert np.abs(data - exact).max() < 1.1 * theirs
