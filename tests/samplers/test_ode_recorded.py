"""ODE samplers: recorded runs of the original; tests/slow has the rest of them."""

import numpy as np
import pytest
from helpers.samplers import RUNS, G, compare_adaptive, compare_fixed, replayed

from sit_jax.samplers.adaptive_ode import AdaptiveODE

# The rest of the recorded runs is in tests/slow. Here are every path, prediction and
# method, guidance, the way back, and a rejected step.
FIXED = "r02 r04 r05 r15 r20 r24 r28 r37 r40".split()
ADAPTIVE = "r07 r10 r11 r12 r13 r22".split()


@pytest.mark.parametrize("name", FIXED)
def test_recorded_fixed_grids(name):
    compare_fixed(name)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_recorded_adaptive_steps(name):
    compare_adaptive(name)


@pytest.mark.parametrize("name", ["r07"])
def test_recorded_dopri5_is_not_further_from_the_solution(name):
    """Not equal: torchdiffeq runs past the end and interpolates back, we end there."""
    run = RUNS[name]
    sampler = AdaptiveODE(rtol=run["rtol"], atol=run["atol"], max_steps=100)
    data, stats = replayed(run, sampler)
    error = np.abs(data - G[run["exact"]][:2]).max()
    assert error < 1.5 * run["solver_error_vs_exact"][0]
    assert (stats["accepted"], stats["rejected"]) == (run["n_accepted"], 0)
    assert stats["evaluations"] == run["nfe"] and stats["finished"]


def test_dopri5_where_the_original_breaks_off():
    """A stage beyond time 1, where VP has no sigma, stops torchdiffeq."""
    assert "underflow" in RUNS["r42"]["error"]
    data, stats = replayed(RUNS["r42"], AdaptiveODE())
    assert stats["finished"] and np.isfinite(data).all()
