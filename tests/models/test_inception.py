"""The 2015 Inception network against torch-fidelity's, and its resize against TF1's."""

import zlib
from functools import cache

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers.recorded import arrays, case, nchw, nhwc, relative

from sit_jax.convert.rules import to_flax
from sit_jax.models.inception import (
    CONVS,
    RULES,
    TF_RULES,
    Inception,
    param_shapes,
    preprocess,
    resize_tf1,
)

G = arrays("inception")
SHAPES = {
    path: leaf.shape for path, leaf in flatten_dict(param_shapes(), sep="/").items()
}
NAMES = {"pool": "2048", "spatial": "spatial7", "logits": "logits_unbiased"}


def torch_shapes():
    """Names and shapes of torch-fidelity's state dict, in its order."""
    back = {"kernel": (3, 2, 0, 1), "fc/kernel": (1, 0)}
    for torch, flax, _ in RULES:
        axes = back.get(flax, back.get(flax.split("/")[-1], (0,)))
        yield torch, tuple(SHAPES[flax][axis] for axis in axes)


@cache
def weights():
    """-> the state dict of the recorded cases, by the rule in their notes."""
    seed, state = case("inception")["weight_seed"], {}
    draw = lambda name, shape: np.random.RandomState(
        zlib.crc32(name.encode()) ^ seed
    ).standard_normal(shape)
    for name, shape in torch_shapes():
        z = draw(name, shape)
        if name.endswith("conv.weight"):
            z = z * np.sqrt(2 / np.prod(shape[1:]))
        elif name == "fc.weight":
            z = 0.03 * z
        elif name.endswith("bn.weight"):
            z = 1 + 0.1 * z
        elif name.endswith("running_var"):
            z = 0.6 + 0.1 * np.abs(z)
        else:
            z = 0.1 * z
        state[name] = z.astype(np.float32)
    return state


network = jax.jit(lambda params, x: Inception().apply({"params": params}, x))


@cache
def flax():
    params, spare = to_flax(RULES, weights())
    assert not spare
    return params


@cache
def features(image):
    return network(flax(), jax.jit(preprocess)(nhwc(G[image])))


@pytest.mark.parametrize("image", ["img0", "img1"])
def test_recorded_features(image):
    found = features(image)
    for ours, theirs in NAMES.items():
        # 3e-7 to 1.2e-6 found: rounding through 94 layers, in another order
        assert relative(found[ours], G[f"numpy_rule.{image}.{theirs}"]) < 5e-6, ours


def test_the_bias_is_kept_and_not_added():
    logits = features("img0")["logits"]
    biased = G["numpy_rule.img0.logits"]
    bias = flax()["fc"]["bias"][None]
    assert relative(logits + bias, biased) < 5e-6
    assert relative(logits, biased) > 1e-4


@pytest.mark.parametrize("number", range(3))
def test_recorded_resizes(number):
    """TF1's rule up, down and not at all."""
    before, after = G[f"resize{number}.in"], G[f"resize{number}.out"]
    found = nchw(jax.jit(resize_tf1, static_argnums=1)(nhwc(before), after.shape[2:]))
    # an ulp of 255 is 1.5e-5; two roundings may differ where a multiply-add is fused
    np.testing.assert_allclose(found, after, rtol=0, atol=4e-5)


@pytest.mark.parametrize("image", ["img0", "img1"])
def test_recorded_resizes_to_299(image):
    found = nchw(jax.jit(resize_tf1)(nhwc(G[image])))
    want, sums = G[f"resize299.{image}.sub"], case("inception")["abs_means"]
    np.testing.assert_allclose(found[:, :, ::13, ::13], want, rtol=0, atol=4e-5)
    total = found.astype(np.float64).sum()  # 4e-10 found
    assert total == pytest.approx(sums[f"resize299.{image}"]["sum"], rel=1e-8)


def test_images_of_299_pixels_stay_as_they_are():
    image = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3)).astype(np.uint8)
    scaled = jax.jit(preprocess)(image)
    np.testing.assert_array_equal(scaled, (image.astype(np.float32) - 128) / 128)


def test_rules_name_every_tensor_once():
    assert len(RULES) == len(TF_RULES) == len(SHAPES) == 472
    assert sum(np.prod(shape) for shape in SHAPES.values()) == 23_885_392
    for rules in (RULES, TF_RULES):
        assert len({name for name, _, _ in rules}) == 472
        assert {path for _, path, _ in rules} == set(SHAPES)


@pytest.mark.parametrize(
    "torch, scope",
    [
        ("Conv2d_4a_3x3", "conv_4"),
        ("Mixed_5d.branch5x5_2", "mixed_2/tower/conv_1"),
        ("Mixed_6a.branch3x3dbl_3", "mixed_3/tower/conv_2"),
        ("Mixed_6d.branch1x1", "mixed_6/conv"),
        ("Mixed_6e.branch7x7dbl_5", "mixed_7/tower_1/conv_4"),
        ("Mixed_7a.branch7x7x3_4", "mixed_8/tower_1/conv_3"),
        ("Mixed_7c.branch3x3dbl_3b", "mixed_10/tower_1/mixed/conv_1"),
        ("Mixed_7c.branch_pool", "mixed_10/tower_2/conv"),
    ],
)
def test_names_in_the_tensorflow_graph(torch, scope):
    assert (torch, scope) in [(conv.name, conv.scope) for conv in CONVS]
