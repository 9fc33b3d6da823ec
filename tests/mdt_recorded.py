"""The recorded networks of MDT and MDTv2, and what ours make of the same inputs."""

import functools

import numpy as np
import pytest
from networks import quick_jit
from recorded import arrays, case, nchw, nhwc, weights

from sit_jax import port
from sit_jax.models import layers
from sit_jax.models.kinds import kind_of
from sit_jax.models.mdt import MDT, MDTv2

BOTH = ["mdt1", "mdt2"]
FREQUENCIES = arrays("dit_forward_a")["freqs_f32"]  # torch's, which are always the same
TINY = dict(width=24, heads=3, patch=2, classes=5)


def recorded_model(name):
    m = case(name)["model"]
    kind = {"MDT": MDT, "MDTv2": MDTv2}[m["cls"]]
    return kind(
        depth=m["depth"],
        width=m["hidden_size"],
        heads=m["num_heads"],
        patch=m["patch_size"],
        decoder=m["decode_layer"],
        hide=m["mask_ratio"],
        classes=m["num_classes"],
    )


@functools.cache
def params(name):
    model = recorded_model(name)
    rules = kind_of(type(model)).rules
    found, spare = port.to_flax(rules, weights(f"{name}_a"))
    ours = kind_of(type(model)).constants(model, 8)
    assert set(ours) == spare
    for index in ours.values():
        np.testing.assert_array_equal(index, arrays(name)["rel_pos_index"])
    return found


def mask(name, noise):
    """The mask that torch made of this noise, as its order and how many are kept."""
    order = np.argsort(noise, axis=1, kind="stable")
    if name == "mdt1":
        return {"order": order}
    return {"order": order, "kept": np.full(len(noise), case(name)["mask"]["len_keep"])}


@functools.cache
def program(name):
    """(params, frequencies, x, t, y, masks) -> output and what submodules returned."""
    model = recorded_model(name)

    def run(params, table, x, t, y, masks):
        see = dict(capture_intermediates=True, mutable="intermediates")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "frequencies", lambda half, shift: table)
            return model.apply({"params": params}, x, t, y, **masks, **see)

    return quick_jit(run)


def forward(name, table, masked, prefix=""):
    golden = arrays(name)
    x, t, y = (golden[f"{prefix}{k}"] for k in "xty")
    masks = mask(name, golden["mask.rand_noise"]) if masked else {}
    out, seen = program(name)(params(name), table, nhwc(x), t, y, masks)
    return nchw(out), seen["intermediates"]
