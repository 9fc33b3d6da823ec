"""The recorded networks of MDT and MDTv2, and what ours make of the same inputs."""

import functools

import numpy as np
import pytest
from helpers.networks import quick_jit, recorded_model, recorded_params
from helpers.recorded import arrays, case, nchw, nhwc

from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.loss_weights import mdt_min_snr_loss
from sit_jax.models import layers

BOTH = ["mdt1", "mdt2"]
FREQUENCIES = arrays("dit_forward_a")["freqs_f32"]  # torch's, which are always the same
TINY = dict(width=24, heads=3, patch=2, classes=5)


def mask(name, noise):
    """The mask that torch made of this noise, as its order and how many are kept."""
    order = np.argsort(noise, axis=1, kind="stable")
    if name == "mdt1":
        return {"order": order}
    return {
        "order": order,
        "num_visible": np.full(len(noise), case(name)["mask"]["len_keep"]),
    }


@functools.cache
def program(name):
    """(params, frequencies, x, t, y, masks) -> output and what submodules returned."""
    model = recorded_model(name)

    def run(params, table, x, t, y, masks):
        see = dict(capture_intermediates=True, mutable="intermediates")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "timestep_frequencies", lambda half, shift: table)
            return model.apply({"params": params}, x, t, y, **masks, **see)

    return quick_jit(run)


def forward(name, table, masked, prefix=""):
    golden = arrays(name)
    x, t, y = (golden[f"{prefix}{k}"] for k in "xty")
    masks = mask(name, golden["mask.rand_noise"]) if masked else {}
    out, seen = program(name)(recorded_params(name), table, nhwc(x), t, y, masks)
    return nchw(out), seen["intermediates"]


def process(name):
    return (
        GaussianDiffusion(objective=mdt_min_snr_loss)
        if name == "mdt2"
        else GaussianDiffusion()
    )


def recorded_masks(name):
    """Those of the losses: in the second version of a share drawn in float32."""
    golden = arrays(name)
    masks = mask(name, golden["loss.rand_noise"])
    if name == "mdt2":
        share = np.float32(0.3) + np.float32(0.2) * golden["loss.rand_ratio"]
        masks["num_visible"] = np.full(3, int((16 * (1 - share)).item()))
    return masks
