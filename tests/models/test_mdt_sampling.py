"""MDT's guidance and chains against recorded ones; strengths that cannot be."""

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import (
    BOTH,
    FREQUENCIES,
    program,
    quick_jit,
    recorded_model,
    recorded_params,
)
from helpers.recorded import arrays, case, nchw, nhwc, relative

from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.guidance import PowerCosine, classifier_free_guidance
from sit_jax.models import layers
from sit_jax.samplers.ddpm import DDPM

STRENGTHS = [(1.5, 4.0), (4.0, 4.0), (4.0, 0.01), (3.8, 1.0)]


@pytest.mark.parametrize("scale, power", STRENGTHS)
def test_the_strength_of_guidance_is_as_recorded_at_every_step(scale, power):
    golden = arrays("mdt2")
    theirs = golden[f"cfg.real_scale_{scale}_pow{power}"]
    ours = PowerCosine(scale, power)(jnp.asarray(golden["cfg.scale_t"]))
    # float32: torch loses digits in 1 - t/T near t = 999, where the scale is 1
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    t = np.arange(1000)
    exact = (1 - np.cos(np.pi * (1 - t / 1000) ** power)) / 2
    ours = PowerCosine(scale, power)(jnp.asarray(t))
    np.testing.assert_allclose(ours, 1 + (scale - 1) * exact, rtol=2e-6)


@pytest.mark.parametrize("name", BOTH)
def test_guided_outputs_are_as_recorded(name):
    golden, model = arrays(name), recorded_model(name)
    run = lambda x, t, y: program(name)(
        recorded_params(name), FREQUENCIES, x, t, y, {}
    )[0]
    x, t, y = (golden[f"cfg.{k}"][:1] for k in "xty")
    for scale, power in STRENGTHS:
        net = classifier_free_guidance(
            run, jnp.asarray(y), model.classes, PowerCosine(scale, power)
        )
        theirs = golden[f"cfg.out_{scale}_pow{power}"][:1]
        # guidance multiplies the rounding of two outputs by the scale and some
        assert relative(nchw(net(nhwc(x), jnp.asarray(t))), theirs) < 1e-5, scale


@pytest.mark.slow
@pytest.mark.parametrize("name, run, cfg", [("mdt1", "r0", 4.0), ("mdt2", "r2", None)])
def test_a_chain_of_eight_steps_ends_as_recorded(name, run, cfg):
    golden, model = arrays(name), recorded_model(name)
    told = next(r for r in case(name)["runs"] if r["id"] == f"sample.{run}")
    noise = nhwc(golden[told["noise"]])[:, :1]
    scale = PowerCosine(cfg, told["scale_pow"]) if cfg else 1

    @quick_jit
    def sample(params, start, noise):
        net = lambda x, t, y: model.apply({"params": params}, x, t, y)
        net = classifier_free_guidance(
            net, jnp.asarray(golden["sample.y"]), model.classes, scale
        )
        chain = DDPM(steps=8, clip=told["clip_denoised"])
        return chain(net, GaussianDiffusion(), start, lambda i: noise[i]).data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "timestep_frequencies", lambda half, shift: FREQUENCIES)
        ours = sample(recorded_params(name), nhwc(golden["sample.z"]), noise)
    floor, size = told["f32_vs_f64"]
    theirs = golden[f"sample.{run}.final"][:1]
    assert np.abs(nchw(ours) - theirs).max() < 5 * max(floor, 1e-5 * size)
