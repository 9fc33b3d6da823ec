"""All recorded ODE runs of the original; tests/test_ode.py has one of each kind."""

import pytest
from test_ode import RUNS, compare_adaptive, compare_fixed

# r42 broke off in the original; r49 goes back from time 1, where VP has no noise and
# the original divides by it
WHOLE = {name: run for name, run in RUNS.items() if name not in ("r42", "r49")}
FIXED = [name for name, run in WHOLE.items() if "n_accepted" not in run]


@pytest.mark.parametrize("name", FIXED)
def test_fixed_grids(name):
    compare_fixed(name)


@pytest.mark.parametrize("name", sorted(set(WHOLE) - set(FIXED)))
def test_adaptive_steps(name):
    compare_adaptive(name)
