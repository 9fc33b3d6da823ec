"""MDT's published sizes, their cost, and settings that no network can have."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import TINY, equations, quick_jit, shapes

from sit_jax.errors import UserError
from sit_jax.models import dit, layers
from sit_jax.models.flops import forward_macs, step_macs
from sit_jax.models.mdt import MDT, MDTv2


@pytest.mark.parametrize(
    "kind, size, decoder, published",
    [(MDTv2, "S", 4, 38_159_576), (MDTv2, "B", 6, 152_112_272)],
    ids=["S", "B"],
)
def test_other_decoders_have_the_published_number_of_parameters(
    kind, size, decoder, published
):
    """The published decoders are in tests/test_configs.py."""
    found = shapes(kind(decoder=decoder, **dit.SIZES[size]), 32)
    assert sum(leaf.size for leaf in jax.tree.leaves(found)) == published


@pytest.mark.parametrize("patch", [4, 8])
def test_larger_patches_change_only_what_depends_on_them(patch):
    count = lambda p: sum(
        leaf.size
        for leaf in jax.tree.leaves(shapes(MDT(patch=p, **dit.SIZES["S"]), 32))
    )
    tables = lambda p: 13 * 6 * ((2 * 32 // p - 1) ** 2 + 3) + 2 * 384 * (32 // p) ** 2
    ends = lambda p: 4 * p * p * 384 + 8 * p * p * 385
    assert count(patch) - count(2) == sum(f(patch) - f(2) for f in (tables, ends))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MDT, MDTv2])
def test_macs_are_those_of_the_products_in_the_program(kind):
    """Scans of one block each, counted from the traced products."""
    model = kind(depth=3 if kind is MDTv2 else 2, decoder=1, **TINY | dict(width=60))
    x, t, y = jnp.ones((1, 16, 16, 4)), jnp.ones(1), jnp.ones(1, int)
    masks = jax.eval_shape(lambda: model.pass_inputs(jax.random.key(0), x.shape)["m_"])

    def products(*masks_):
        run = lambda p, m: model.apply({"params": p}, x, t, y, **m)
        total = 0
        for eqn in equations(jax.make_jaxpr(run)(shapes(model, 16), *masks_).jaxpr):
            if eqn.primitive.name == "dot_general":
                (axes, _), _ = eqn.params["dimension_numbers"]
                shape = eqn.invars[0].aval.shape
                total += eqn.outvars[0].aval.size * math.prod(shape[i] for i in axes)
            if eqn.primitive.name == "conv_general_dilated":
                shape = eqn.invars[1].aval.shape
                total += eqn.outvars[0].aval.size * math.prod(shape[:3])
        return total

    assert products({}) == forward_macs(model, (16, 16, 4))
    both = products({}) + products(masks)
    assert both == step_macs(model, (16, 16, 4))
    assert step_macs(kind(), (32, 32, 4)) < 1.8 * forward_macs(kind(), (32, 32, 4))


@pytest.mark.slow
def test_initial_weights_are_distributed_as_published():
    model = MDT(depth=2, decoder=1, width=64, heads=4, classes=5)
    x, t, y = jnp.ones((1, 16, 16, 4)), jnp.ones(1), jnp.ones(1, int)
    drawn = quick_jit(model.init)(jax.random.key(0), x, t, y)["params"]
    for run in ("blocks", "side_blocks"):
        assert not np.any(drawn[run]["adaLN"]["kernel"])
        table = drawn[run]["attn"]["position"]  # 912 values: 10 percent is 4 sd
        assert np.std(table) == pytest.approx(0.02, rel=0.1)
    assert np.abs(table).max() > 0.05  # not cut off at two deviations
    assert np.std(drawn["hidden_token"]) == pytest.approx(0.02, rel=0.35)
    for name in ("positions", "decoder_positions"):
        np.testing.assert_array_equal(drawn[name][0], layers.sincos_pos_embed_2d(8, 64))


@pytest.mark.parametrize(
    "kind, fields, side, message",
    [
        (MDT, dict(decoder=3), 8, "decoder 3 of 3 blocks leaves no encoder.*MDT needs"),
        (MDT, dict(decoder=0), 8, "decoder 0 of 3 .*model.decoder in 1..2"),
        (MDTv2, dict(decoder=2), 8, "decoder 2 of 3 .*MDTv2 needs .* in 1..1"),
        (MDTv2, dict(depth=4, decoder=1), 8, "depth 4 - decoder 1 is odd"),
        (
            MDT,
            dict(mask_ratio=1.0),
            8,
            "mask_ratio 1.0 and model.mask_ratio_range 0.0 must be from 0 on",
        ),
        (
            MDTv2,
            dict(mask_ratio=0.9, mask_ratio_range=0.2),
            8,
            "leave one of 16 tokens",
        ),
        (MDT, dict(mask_ratio=-0.1), 8, "model.mask_ratio -0.1"),
        (MDT, {}, 9, "side 9 is not divisible by patch 2"),
        (MDT, dict(heads=5), 8, "width 24 is not divisible by heads 5"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_impossible_settings_are_named(kind, fields, side, message):
    model = kind(**dict(depth=3, decoder=1) | TINY | fields)
    with pytest.raises(UserError, match=message):
        shapes(model, side)


def test_a_network_without_a_masked_pass_has_one_pass_and_takes_no_mask():
    model = MDT(depth=2, decoder=1, mask_ratio=None, **TINY)
    assert model.pass_inputs(jax.random.key(0), (2, 8, 8, 4)) == {"": {}}
    x, t, y = jnp.ones((1, 8, 8, 4)), jnp.ones(1), jnp.ones(1, int)
    order = jnp.arange(16)[None]
    with pytest.raises(UserError, match="model.mask_ratio is None"):
        jax.eval_shape(lambda: model.init(jax.random.key(0), x, t, y, order=order))
