"""Networks whose right answer is known, ODE samplers, and the recorded runs."""

from functools import cache, partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from helpers.recorded import arrays, case, nchw, nhwc, weights

from sit_jax.convert.rules import DIT_RULES, to_flax
from sit_jax.diffusion import predictions
from sit_jax.diffusion.guidance import classifier_free_guidance, guide_both_halves
from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.diffusion.paths import VP, expand_dims_like, gvp, linear
from sit_jax.models.dit import SiT
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

PATHS = {"Linear": linear, "GVP": gvp, "VP": VP()}
PREDICTS = {
    "velocity": predictions.velocity,
    "score": predictions.score,
    "noise": predictions.noise,
}
# for programs that run once: compiling them well would take longer than running them
once = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
EVERY = [(path, predicts) for path in PATHS for predicts in PREDICTS]


def one_image(process, data):
    """The best network if all data are this one image: x tells the noise exactly."""

    def net(x, t):
        alpha, sigma = process.path(expand_dims_like(t, x))
        p, q = process.prediction(process.path, expand_dims_like(t, x))
        # at time 1 there is no noise left to tell
        return p * data + q * (x - alpha * data) / jnp.maximum(sigma, 1e-3)

    return net


def gaussian(process, mean, std):
    """The best network if each value of the data is a sample of N(mean, std^2)."""

    def net(x, t):
        at = expand_dims_like(t, x)
        alpha, sigma = process.path(at)
        p, q = process.prediction(process.path, at)
        pull = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return p * (mean + alpha * std**2 * pull) + q * sigma * pull

    return net


@cache
def tiny():
    """-> (model, params) with the recorded weights sit_a."""
    params, _ = to_flax(DIT_RULES, weights("sit_a"))
    return SiT(depth=2, width=40, heads=4, patch=2, classes=10), params


def sampled(sampler, process, labels, start, draws=None, cfg=None):
    """What a sampler makes of NHWC noise with the tiny network: (NCHW, stats)."""
    model, params = tiny()

    doubled = cfg and sampler.integrates_null_half

    @once
    def run(params, start, draws):
        net = lambda x, t, y: model.apply({"params": params}, x, t, y)
        halves = guide_both_halves if doubled else classifier_free_guidance
        net = halves(net, jnp.asarray(labels), 10, cfg or 1)
        start = jnp.concatenate([start, start]) if doubled else start
        result = sampler(net, process, start, lambda i: draws[i])
        data, stats = result.data, result.stats()
        return data[: len(labels)], stats

    data, stats = run(params, start, draws)
    return nchw(data), {name: int(value) for name, value in stats.items()}


def counted(net):
    """-> (net, list): the list grows by one at every evaluation at run time."""
    calls = []

    def counting(x, t):
        jax.debug.callback(lambda _: calls.append(1), t)
        return net(x, t)

    return counting, calls


def assert_close(ours, theirs, floor):
    """Within 5 x the recorded float32 - float64 difference, or 1e-5 of the scale.

    floor is that pair (difference, scale) as the manifest has it; two float32 programs
    that sum in different orders differ by about the former.
    """
    difference, scale = floor
    worst = np.abs(np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)).max()
    assert worst <= max(5 * difference, 1e-5 * scale)


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
