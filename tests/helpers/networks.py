"""Networks and their recorded outputs, weights, traced programs, attention."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.recorded import arrays, case, nchw, nhwc, weights
from jax.extend.core import jaxprs_in_params

from sit_jax.convert.rules import rules_for, to_flax, torch_constants
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.loss_weights import mdt_min_snr_loss
from sit_jax.models import layers
from sit_jax.models.dit import DiT, SiT
from sit_jax.models.mdt import MDT, MDTv2

# Compiling is what takes the time here; unoptimized it takes half.
quick_jit = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
SMALL = dict(depth=3, width=24, heads=3, classes=5)


KINDS = {kind.__name__: kind for kind in (SiT, DiT, MDT, MDTv2)}
FIELDS = {
    "depth": "depth",
    "hidden_size": "width",
    "num_heads": "heads",
    "patch_size": "patch",
    "mlp_ratio": "mlp_ratio",
    "num_classes": "classes",
    "learn_sigma": "learn_sigma",
    "mask_ratio": "mask_ratio",
    "decode_layer": "decoder",
}


def recorded_model(name, **changes):
    m = case(name)["model"]
    fields = {ours: m[theirs] for theirs, ours in FIELDS.items() if theirs in m}
    fields["null_label"] = m["class_dropout_prob"] > 0
    return KINDS[m["cls"]](**fields | changes)


@functools.cache
def recorded_params(name):
    """Of any kind; what torch keeps beside the weights is ours to the bit."""
    told, model = case(name), recorded_model(name)
    state = weights(Path(told["checkpoint"]).stem)
    params, spare = to_flax(rules_for(model), state)
    constants = torch_constants(model, told["model"]["input_size"])
    assert set(constants) == spare
    for key, ours in constants.items():
        np.testing.assert_array_equal(ours, state[key])
    return jax.tree.map(jnp.asarray, params)


def shapes(model, side=16, channels=4):
    x = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    t, y = (
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    return jax.eval_shape(model.init, jax.random.key(0), x, t, y)["params"]


@functools.cache
def noisy():
    """Small random weights nowhere zero, and inputs, shared by the tests below."""
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.normal(0, 0.15, s.shape), jnp.float32)
    params = jax.tree.map(draw, shapes(SiT(**SMALL), 8))
    x = jnp.asarray(rng.normal(size=(2, 8, 8, 4)), jnp.float32)
    return params, x, jnp.array([0.2, 0.9]), jnp.array([1, 5])


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from equations(inner)


def traced_macs(fn, *args):
    """Counts the multiply-adds of fn's products, a scan's once."""
    total = 0
    for eqn in equations(jax.make_jaxpr(fn)(*args).jaxpr):
        if eqn.primitive.name == "dot_general":
            (axes, _), _ = eqn.params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += eqn.outvars[0].aval.size * math.prod(shape[i] for i in axes)
        if eqn.primitive.name == "conv_general_dilated":
            shape = eqn.invars[1].aval.shape
            total += eqn.outvars[0].aval.size * math.prod(shape[:3])
    return total


def released_entries(depth, width, patch, classes, out=8, side=8, channels=4):
    """Names and shapes of a released file in its order, from the published code."""
    tokens, hidden = (side // patch) ** 2, 4 * width
    yield "pos_embed", (1, tokens, width)
    yield "x_embedder.proj.weight", (width, channels, patch, patch)
    yield "x_embedder.proj.bias", (width,)
    yield from linear("t_embedder.mlp.0", width, 256)
    yield from linear("t_embedder.mlp.2", width, width)
    yield "y_embedder.embedding_table.weight", (classes + 1, width)
    for i in range(depth):
        yield from linear(f"blocks.{i}.attn.qkv", 3 * width, width)
        yield from linear(f"blocks.{i}.attn.proj", width, width)
        yield from linear(f"blocks.{i}.mlp.fc1", hidden, width)
        yield from linear(f"blocks.{i}.mlp.fc2", width, hidden)
        yield from linear(f"blocks.{i}.adaLN_modulation.1", 6 * width, width)
    yield from linear("final_layer.linear", patch**2 * out, width)
    yield from linear("final_layer.adaLN_modulation.1", 2 * width, width)


def linear(name, rows, columns):
    return [(f"{name}.weight", (rows, columns)), (f"{name}.bias", (rows,))]


def random_state(depth=2, width=16, patch=2, classes=3, **sizes):
    """Every bit pattern matters here, so every entry is its own random numbers."""
    rng = np.random.default_rng(depth)
    names = released_entries(depth, width, patch, classes, **sizes)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in names}


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


def inputs(rows=2, heads=3, length=6, keys=6, width=4):
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    q, k, v = (draw(rows, n, heads, width) for n in (length, keys, keys))
    return q, k, v, draw(1, heads, length, keys), rng.random((rows, 1, 1, keys)) < 0.7


def exact(q, k, v, bias=0.0, mask=True):
    """The formula in float64."""
    q, k, v = (np.float64(x).transpose(0, 2, 1, 3) for x in (q, k, v))
    scores = q @ k.swapaxes(2, 3) / np.sqrt(q.shape[-1]) + bias
    weights = np.where(mask, np.exp(scores), 0)
    return (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3)
