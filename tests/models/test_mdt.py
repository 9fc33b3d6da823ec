"""MDT and MDTv2 against the recorded PyTorch runs, with and without hidden tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import networks
from helpers.networks import (
    BOTH,
    FREQUENCIES,
    TINY,
    forward,
    mask,
    program,
    quick_jit,
    recorded_model,
    recorded_params,
    shapes,
)
from helpers.recorded import arrays, nhwc, relative

from sit_jax.models import layers, mdt
from sit_jax.models.mdt import MDTv2

# With our own table t = 999 multiplies the last-bit difference of three frequencies;
# with the recorded one only rounding is left, of which 7e-7 was seen.
TABLES = {
    "own": (layers.timestep_frequencies(128), 2e-5),
    "recorded": (FREQUENCIES, 2e-6),
}


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(
    "table", ["recorded", pytest.param("own", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", BOTH)
def test_outputs_are_as_recorded(name, table, masked):
    values, tolerance = TABLES[table]
    out, _ = forward(name, values, masked)
    theirs = arrays(name)["mask.out" if masked else "nomask.out"]
    assert relative(out, theirs) < tolerance


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_every_block_of_the_second_version_is_as_recorded(masked):
    """In the masked pass the encoder's tokens lie in the order of their noise."""
    golden, (_, seen) = arrays("mdt2"), forward("mdt2", FREQUENCIES, masked)
    prefix = "mask.act." if masked else "nomask.act."
    runs = {"en_inblocks": "in_blocks", "en_outblocks": "out_blocks"}
    runs |= {"de_blocks": "decoder_blocks", "sideblocks": "side_blocks"}
    theirs = {k: v for k, v in golden.items() if k.startswith(prefix)}
    assert len(theirs) == (5 if masked else 4)
    for key, tokens in theirs.items():
        run, i = key.removeprefix(prefix).split(".")
        ours = seen[runs[run]]["__call__"][0][0][int(i)]
        ours = ours[:, : tokens.shape[1]]  # behind them those that this draw hid
        assert relative(ours, tokens) < 2e-6, key


def test_the_encoders_last_block_gets_what_its_first_one_left():
    """The recorded network has one of each, which says nothing of the order."""
    model = MDTv2(depth=5, decoder=1, **TINY)
    rng = np.random.default_rng(0)
    draw = lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32)
    drawn = jax.tree.map(draw, shapes(model, 8))
    x, t, y = draw(np.zeros((1, 8, 8, 4))), np.array([9]), np.array([1])

    @quick_jit
    def run(drawn, x):
        see = dict(capture_intermediates=True, mutable="intermediates")
        seen = model.apply({"params": drawn}, x, t, y, **see)[1]["intermediates"]
        first, last = (seen[k]["__call__"][0][0] for k in ("in_blocks", "out_blocks"))
        second = jax.tree.map(lambda w: w[1], drawn["out_blocks"])
        block, c = (
            mdt.MDTBlock(heads=3, side=4),
            seen["cond"]["__call__"][0],
        )
        again = lambda skip: block.apply({"params": second}, last[0], skip, c, None)[0]
        return last[1], again(first[0]), again(first[1])

    ours, lifo, fifo = run(drawn, x)
    assert relative(lifo, ours) < 2e-6 and relative(fifo, ours) > 1e-2


def test_the_order_is_a_permutation_and_the_share_that_of_the_release():
    draw = lambda key: mdt.sample_masks(MDTv2(), key, 2, 256)
    drawn = quick_jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 200))
    order, kept = np.asarray(drawn["order"]), np.asarray(drawn["num_visible"])
    np.testing.assert_array_equal(np.sort(order, axis=2)[7, 1], np.arange(256))
    assert not np.array_equal(*order[7])
    assert (kept[:, 0] == kept[:, 1]).all()  # one share for the batch
    assert 128 <= kept.min() <= 132 and 176 <= kept.max() <= 179
    assert mdt.max_visible(256, 0.3) == 179 and mdt.max_visible(16, 0.3) == 11
    # uniform: the mean of 200 draws is within 5 standard errors of the middle
    assert abs(kept.mean() - 153.1) < 5 * 51.2 / 12**0.5 / 200**0.5
    assert set(mdt.sample_masks(mdt.MDT(), jax.random.key(0), 2, 256)) == {"order"}


def test_no_more_is_kept_than_is_gathered(monkeypatch):
    """100 (1 - 0.9) is 9 in float64 and 10 in float32."""
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape=(): jnp.zeros(shape))
    model = MDTv2(mask_ratio=0.9, mask_ratio_range=0.05)
    drawn = mdt.sample_masks(model, jax.random.key(0), 2, 100)
    assert drawn["num_visible"].tolist() == [mdt.max_visible(100, 0.9)] * 2 == [9, 9]


def test_what_is_hidden_is_not_seen_by_the_first_version():
    """Its decoder gets nothing of the input but through the encoder."""
    golden = arrays("mdt1")
    before, _ = forward("mdt1", FREQUENCIES, masked=True)
    order = mask("mdt1", golden["mask.rand_noise"])["order"]
    hidden = np.zeros((2, 16))
    for b in range(2):
        hidden[b, order[b, 11:]] = 1
    hidden = hidden.reshape(2, 4, 4).repeat(2, 1).repeat(2, 2)[:, None]  # pixels
    with pytest.MonkeyPatch.context() as patch:
        for where, changes in ((hidden, False), (1 - hidden, True)):
            moved = {**golden, "x": (golden["x"] + where).astype(np.float32)}
            patch.setattr(networks, "arrays", lambda name, moved=moved: moved)
            after, _ = forward("mdt1", FREQUENCIES, masked=True)
            assert (relative(after, before) > 1e-3) == changes
            assert np.array_equal(after, before) != changes


def test_tokens_hidden_by_a_larger_draw_are_as_if_not_gathered():
    """One program for every share, and equal to the static one of just that share."""
    golden, model = arrays("mdt2"), recorded_model("mdt2")
    order = mask("mdt2", golden["mask.rand_noise"])["order"]
    x, t, y = nhwc(golden["x"]), golden["t"], golden["y"]
    drawn = lambda kept: program("mdt2")(
        *(recorded_params("mdt2"), FREQUENCIES, x, t, y),
        {"order": order, "num_visible": np.full(2, kept)},
    )[0]
    exact = model.clone(mask_ratio=0.45, mask_ratio_range=0.0)
    assert mdt.max_visible(16, 0.45) == 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "timestep_frequencies", lambda half, shift: FREQUENCIES)
        static = quick_jit(exact.apply)(
            {"params": recorded_params("mdt2")}, *(x, t, y), order=order
        )
    assert relative(drawn(8), static) < 2e-6
    programs = program("mdt2")._cache_size()
    assert relative(drawn(9), static) > 1e-3
    assert program("mdt2")._cache_size() == programs
