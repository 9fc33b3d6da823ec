"""The ODE samplers that several tests run, and the recorded runs."""

import diffrax
import jax.numpy as jnp
import numpy as np
from helpers.recorded import arrays, case, nhwc
from helpers.toys import PATHS, PREDICTS, assert_close, once, sampled

from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.paths import expand_dims_like
from sit_jax.samplers.adaptive_ode import AdaptiveODE, Fehlberg2, per_sample_control
from sit_jax.samplers.fixed_ode import (
    Adams,
    FixedStepODE,
    euler,
    heun,
    heun3,
    midpoint,
    rk4,
)
from sit_jax.samplers.torchdiffeq import torchdiffeq_control

G = arrays("sit_ode")
RUNS = {run["id"]: run for run in case("sit_ode")["runs"]}
METHODS = {
    "euler": euler,
    "midpoint": midpoint,
    "heun2": heun,
    "heun3": heun3,
    "rk4": rk4,
}
SOLVERS = {
    "dopri5": diffrax.Dopri5(),
    "dopri8": diffrax.Dopri8(),
    "bosh3": diffrax.Bosh3(),
    "adaptive_heun": diffrax.Heun(),
    "fehlberg2": Fehlberg2(),
}
SAMPLERS = {
    "fixed": FixedStepODE(heun, 3),
    "adams": Adams(4),
    "global": AdaptiveODE(rtol=1e-4, atol=1e-4),
    "sample": AdaptiveODE(rtol=1e-4, atol=1e-4, control=per_sample_control),
    "torchdiffeq": AdaptiveODE(rtol=1e-4, atol=1e-4, control=torchdiffeq_control),
}


def replayed(run, sampler):
    process = Interpolant(PATHS[run["path"]], PREDICTS[run["prediction"]])
    start = nhwc(G["x_data" if run["reverse"] else "z"])
    return sampled(sampler, process, G["y"], start, cfg=run["cfg"])


def compare_fixed(name):
    run = RUNS[name]
    # their number of steps counts the points of the grid
    sampler = FixedStepODE(METHODS[run["method"]], run["num_steps"] - 1, run["reverse"])
    data, stats = replayed(run, sampler)
    assert_close(data, G[f"{name}.final"][:2], run["f32_vs_f64"])
    assert stats == {"evaluations": run["nfe"]}


def compare_adaptive(name):
    """By the same steps, to the same numbers."""
    run = RUNS[name]
    sampler = AdaptiveODE(
        SOLVERS[run["method"]],
        rtol=run["rtol"],
        atol=run["atol"],
        control=torchdiffeq_control,
        reverse=run["reverse"],
    )
    data, stats = replayed(run, sampler)
    noise, scale = run["f32_vs_f64"]
    # where atol is near the rounding of float32, that decides about step sizes; the
    # recording then differs from its own float64 run, by `noise`
    error = np.abs(data - G[f"{name}.final"][:2]).max()
    assert error <= max(1e-4, 1e-5 * scale, 5 * noise), (error, noise)
    assert stats.pop("evaluations") == run["nfe"]
    counts = {"accepted": run["n_accepted"], "rejected": run["n_rejected"]}
    assert stats == {**counts, "finished": True}


def solved(sampler, x=1.0):
    """dx/dt = x + t from 0 to 1, forwards or backwards: -> relative error, stats."""
    start = jnp.full((2, 2, 2, 1), x)
    net = lambda x, t: x + expand_dims_like(t, x)
    run = once(lambda start: sampler(net, Interpolant(), start))
    result = run(start)
    data, stats = result.data, result.stats()
    exact = (x + 2) / np.e - 1 if sampler.reverse else (x + 1) * np.e - 2
    return float(np.abs(data - exact).max() / abs(exact)), stats
