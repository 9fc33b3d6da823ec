"""MDT's published sizes, their cost, and settings that no network can have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import TINY, quick_jit, shapes, traced_macs

from sit_jax.errors import UserError
from sit_jax.models import dit, layers
from sit_jax.models.flops import forward_macs, step_macs
from sit_jax.models.mdt import MDT, MDTv2


def test_another_decoder_has_the_published_number_of_parameters():
    """The published decoders are in tests/test_configs.py."""
    params = shapes(MDTv2(decoder=6, **dit.SIZES["B"]), 32)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 152_112_272


def test_larger_patches_change_only_what_depends_on_them():
    of_patch = lambda p: shapes(MDT(patch=p, **dit.SIZES["S"]), 32)
    count = lambda p: sum(leaf.size for leaf in jax.tree.leaves(of_patch(p)))
    tables = lambda p: 13 * 6 * ((2 * 32 // p - 1) ** 2 + 3) + 2 * 384 * (32 // p) ** 2
    ends = lambda p: 4 * p * p * 384 + 8 * p * p * 385
    assert count(8) - count(2) == sum(f(8) - f(2) for f in (tables, ends))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MDT, MDTv2])
def test_macs_are_those_of_the_products_in_the_program(kind):
    """Scans of one block each, counted from the traced products."""
    model = kind(depth=3 if kind is MDTv2 else 2, decoder=1, **TINY | dict(width=60))
    x, t, y = jnp.ones((1, 16, 16, 4)), jnp.ones(1), jnp.ones(1, int)
    masks = jax.eval_shape(lambda: model.pass_inputs(jax.random.key(0), x.shape)["m_"])

    def products(masks):
        run = lambda p, m: model.apply({"params": p}, x, t, y, **m)
        return traced_macs(run, shapes(model, 16), masks)

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
        (MDT, dict(mask_ratio=1.0), 8, "mask_ratio 1.0 and .* must be from 0 on"),
        (MDTv2, dict(mask_ratio=0.9), 8, "leave one of 16 tokens"),
        (MDT, dict(mask_ratio=-0.1), 8, "model.mask_ratio -0.1"),
        (MDTv2, dict(depth=3, mask_buckets=0), 8, "mask_buckets is 0: at least 1"),
        (MDT, {}, 9, "side 9 is not divisible by patch 2"),
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
