"""DDPM's and DDIM's chains against recorded runs and released numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import diffusions
from helpers.diffusions import CHAIN_RUNS, sample, watched
from helpers.recorded import arrays, nchw, nhwc

from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.guidance import classifier_free_guidance
from sit_jax.diffusion.rng import recorded_noise
from sit_jax.diffusion.schedules import DDIMSpacing
from sit_jax.samplers.ddpm import DDIM, DDPM

model = diffusions.model

RUNS = {r["id"]: r for r in CHAIN_RUNS if "sample" in r["loop"]}
BACK = {r["id"]: r for r in CHAIN_RUNS if r["loop"] == "ddim_reverse"}


def sampler_of(run):
    steps = DDIMSpacing(25) if run["respacing"] == "ddim25" else int(run["respacing"])
    if run["loop"] == "p_sample_loop":
        return DDPM(steps, clip=run["clip_denoised"])
    return DDIM(steps, eta=run["eta"], clip=run["clip_denoised"])


@pytest.mark.parametrize("name", RUNS)
def test_recorded_runs(name, model):
    g, run = arrays("dit_sampling"), RUNS[name]
    labels, sampler = jnp.asarray(g["y"]), sampler_of(run)
    # torch runs both halves of the guidance as one batch, each with noise of its own;
    # the labelled half is the result, the other half's state never reaches it
    draw = recorded_noise(nhwc(g[run["noise"]])[:, :2])
    states = []
    net = watched(classifier_free_guidance(model, labels, 10, run["cfg"] or 1), states)
    chain = jax.jit(lambda z: sampler(net, GaussianDiffusion(), z, draw))
    result = chain(nhwc(g["z"]))
    data, stats = result.data, result.stats()
    jax.effects_barrier()
    assert stats["evaluations"] == len(states) == run["num_timesteps"]
    # five times the recording's own float32 noise at its end, of the scale there
    # (the unclipped random network leads to values of a thousand); at least 1e-5
    noise, scale = run["f32_vs_f64"]
    slack = max(1e-5, 5 * noise / scale)
    found = {"step0": states[1], "step_mid": states[6], "final": data}
    if noise / scale > 1e-3:
        del found["final"]  # clipping under strong guidance amplifies rounding
    for key in found if "step_mid_index" in run else ["final"]:
        theirs = g[f"{name}.{key}"][:2]
        tolerance = slack * np.abs(theirs).max()
        np.testing.assert_allclose(
            nchw(found[key]), theirs, atol=tolerance, err_msg=key
        )


@pytest.mark.parametrize("name", BACK)
def test_recorded_ways_back(name, model):
    """From data to noise; the original has the step, and no loop of it."""
    g, run = arrays("dit_sampling"), BACK[name]
    net = classifier_free_guidance(model, jnp.asarray(g["y"]), 10, run["cfg"] or 1)
    sampler = DDIM(DDIMSpacing(25), clip=run["clip_denoised"], reverse=True)
    chain = jax.jit(lambda x: sampler(net, GaussianDiffusion(), x).data)
    end = nchw(chain(nhwc(g["x_data"])))
    rounding, scale = run["f32_vs_f64"]
    theirs = g[f"{name}.final"][:2]
    slack = max(1e-5, 5 * rounding / scale) * np.abs(theirs).max()
    np.testing.assert_allclose(end, theirs, atol=slack)


def formula(name, steps, eta=0.0, clip=False):
    """The first numbers of a chain of closed-form network, start and noise."""
    shape = (2, 4, 2, 2)
    wave = lambda x: nhwc(np.cos(x).astype(np.float32).reshape(shape))
    count = np.arange(32.0)

    def net(x, t):
        guess = 0.5 * x + 1e-4 * t[:, None, None, None]
        return jnp.concatenate([guess, 0.3 * jnp.sin(x)], axis=-1)

    sampler = (
        name(steps, clip=clip) if name is DDPM else name(steps, eta=eta, clip=clip)
    )
    kicks = np.stack([wave(1.7 * count + k) for k in range(steps)])
    z = wave(0.9 * count)
    return nchw(sample(sampler, GaussianDiffusion(), net, z, kicks)).ravel()[:3]


@pytest.mark.parametrize(
    "arguments, recorded",
    [
        ((DDPM, 250), [0.2461303, -0.1848996, -0.5418665]),
        ((DDPM, 250, 0, True), [-0.0825307, -0.1264677, -0.1607517]),
        ((DDIM, 250, 0.0), [7.6520476, 4.2394667, -3.4156756]),
        ((DDIM, 250, 0.5, True), [0.6620407, 0.3660417, -0.4498788]),
        ((DDIM, 250, 1.0), [0.2500244, -0.1797140, -0.5445823]),
        ((DDIM, 10, 1.0), [4.5661392, -0.5709831, -3.7925200]),
    ],
)
def test_released_chains_of_a_formula(arguments, recorded):
    """Long chains and eta = 1, which the runs of the network lack."""
    # 1e-5: rounding over 250 steps, and seven digits in the list above
    slack = 1e-5 * np.abs(recorded).max()
    np.testing.assert_allclose(formula(*arguments), recorded, atol=slack)
