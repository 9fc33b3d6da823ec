"""Attention's programs: equal numbers, and each only where it can run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import SMALL, equations, noisy, quick_jit
from recorded import relative

from sit_jax.errors import UserError
from sit_jax.models import attention
from sit_jax.models.applied import apply
from sit_jax.models.dit import SiT
from sit_jax.models.layers import REMAT
from sit_jax.models.mdt import MDT
from sit_jax.quantized import eight
from sit_jax.residuals import saved_bytes


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


@pytest.mark.parametrize("n", [3, 4, 5])  # without and with a bias and a mask
@pytest.mark.parametrize("by", ["xla", "head_by_head", "heads_first", "auto"])
def test_every_program_computes_the_formula(by, n, monkeypatch):
    monkeypatch.setattr(attention, "CACHE", 0)  # as if these were large
    monkeypatch.setattr(attention, "TURN", 0)
    q, k, v, *more = inputs()[:n]
    out = attention.attend(q, k, v, *more, by=by)
    # ten float32 operations deep
    assert relative(out, exact(q, k, v, *more)) < 1e-6


@pytest.mark.parametrize("most, length", [(0.5, [6]), (1, [6]), (2, [3]), (3, [])])
def test_heads_take_turns_together_as_the_scores_allow(most, length, monkeypatch):
    q, k, v, *_ = inputs(heads=6)
    size = 2 * 6 * 6 * 4  # of the scores of a head
    monkeypatch.setattr(attention, "TURN", most * size)
    program = jax.make_jaxpr(lambda *a: attention.heads_first(*a))(q, k, v)  # anew
    loops = [e for e in equations(program.jaxpr) if e.primitive.name == "scan"]
    assert [e.params["length"] for e in loops] == length
    found = attention.heads_first(q, k, v)
    assert relative(found, exact(q, k, v)) < 1e-6


def test_head_head_by_head_has_the_same_derivatives(monkeypatch):
    monkeypatch.setattr(attention, "CACHE", 0)
    monkeypatch.setattr(attention, "TURN", 0)
    q, k, v, bias, mask = inputs(keys=5)

    def slopes(by):
        loss = lambda *a: jnp.square(attention.attend(*a, mask, by=by)).sum()
        return quick_jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(q, k, v, bias)

    usual = slopes("xla")
    for by in ("head_by_head", "heads_first"):
        for ours, theirs in zip(slopes(by), usual, strict=True):
            assert relative(ours, theirs) < 3e-6


@pytest.mark.parametrize("form", ["floats", "int8"])
def test_a_network_computes_alike_in_either_layout(form):
    """Also where a weight's product is taken outside of its layer."""
    params, *given = noisy()
    if form == "int8":
        params = jax.tree.map(lambda x: x, params)  # others share it
        kernel = params["blocks"]["attn"]["qkv"]["kernel"]
        params["blocks"]["attn"]["qkv"]["kernel"] = eight(kernel)
    run = lambda by: apply(SiT(**SMALL, attention=by), params, *given)
    assert relative(run("heads_first"), run("xla")) < 1e-6  # some 30 operations deep


def test_dots_keeps_what_a_tpus_attention_gave():
    """Of every layer, image and token the width; scores are computed again."""
    model = SiT(**SMALL, remat="dots", attention="xla")
    kept = [
        saved_bytes(model.clone(attention=by), (16, 16, 4), 2)
        for by in ("xla", "heads_first")
    ]
    assert kept[1] - kept[0] == 4 * model.depth * 2 * 64 * model.width


def test_small_scores_are_taken_at_once():
    q, k, v, *_ = inputs()
    program = lambda: str(jax.make_jaxpr(attention.head_by_head)(q, k, v))
    assert "scan" not in program()


def test_large_scores_are_taken_head_head_by_head_and_not_kept(monkeypatch):
    monkeypatch.setattr(attention, "CACHE", 2 * 3 * 6 * 6 * 4 - 1)
    q, k, v, *_ = inputs()
    slope = jax.grad(lambda q: attention.head_by_head(q, k, v).sum())
    loops = [
        e
        for e in equations(jax.make_jaxpr(slope)(q).jaxpr)
        if e.primitive.name == "scan"
    ]
    assert [e.params["length"] for e in loops] == [3, 3]
    handed_on = [x.aval.shape for x in loops[0].outvars]
    assert (3, 2, 6, 6) not in [s[:2] + s[-2:] for s in handed_on]


@pytest.mark.parametrize("rows", [1, 2])  # of the bias: for all images, or each its own
@pytest.mark.parametrize("masks", [0, 1, 3])  # none, for all heads, for each its own
def test_packed_attention_is_that_of_its_parts(rows, masks, monkeypatch):
    """Each head is read from qkv, and its gradient is written over it."""
    monkeypatch.setattr(attention, "CACHE", 0)
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    qkv, bias = draw(2, 6, 3, 3, 4), draw(rows, 3, 6, 6)
    mask = rng.random((2, masks, 1, 6)) < 0.7 if masks else None
    if masks:
        mask[..., 0] = True  # who sees nothing has no meaningful gradient

    def packed(qkv, bias):
        return attention.attend_packed(qkv, bias, mask, by="head_by_head")

    def exactly(qkv, bias):
        return attention.xla(*(qkv[:, :, n] for n in range(3)), bias, mask)

    assert relative(packed(qkv, bias), exactly(qkv, bias)) < 1e-6
    loss = lambda f: lambda *a: jnp.square(f(*a)).sum()
    slopes = lambda f: quick_jit(jax.grad(loss(f), (0, 1)))(qkv, bias)
    for ours, usual in zip(slopes(packed), slopes(exactly), strict=True):
        assert relative(ours, usual) < 3e-6


def test_kept_results_spare_the_loop_forward_a_second_time(monkeypatch):
    monkeypatch.setattr(attention, "CACHE", 0)
    q, k, v, *_ = inputs()

    def loops(policy):
        run = jax.checkpoint(attention.head_by_head, policy=policy)
        slope = jax.grad(lambda q: jnp.square(run(q, k, v)).sum())
        program = equations(jax.make_jaxpr(slope)(q).jaxpr)
        return sum(e.primitive.name == "scan" for e in program)

    assert loops(REMAT["dots"]) == 2
    assert loops(REMAT["full"]) == 3


def test_head_by_head_sums_bfloat16_in_float32(monkeypatch):
    monkeypatch.setattr(attention, "CACHE", 0)
    given = [jnp.asarray(x, jnp.bfloat16) for x in inputs(length=40, keys=40)[:3]]

    def slopes(by, given):
        loss = lambda *a: attention.attend(*a, by=by).astype(jnp.float32).sum()
        return quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(*given)

    exactly = slopes("xla", [x.astype(jnp.float32) for x in given])
    found = (slopes("head_by_head", given), slopes("xla", given), exactly)
    for ours, usual, true in zip(*found, strict=True):
        assert ours.dtype == jnp.bfloat16
        far, usually = (relative(x.astype(jnp.float32), true) for x in (ours, usual))
        # no further from the slopes in float32 than the usual program is
        assert far < max(1.5 * usually, 4e-3)


def test_the_field_reaches_every_block(monkeypatch):
    monkeypatch.setattr(attention, "CACHE", 0)
    monkeypatch.setattr(attention, "TURN", 0)
    params, *given = noisy()

    def loops(by):
        run = lambda p: SiT(**SMALL, attention=by).apply({"params": p}, *given)
        found = equations(jax.make_jaxpr(run)(params).jaxpr)
        return sum(e.primitive.name == "scan" for e in found)

    found = [loops(by) for by in ("xla", "head_by_head", "heads_first", "auto")]
    assert found == [1, 2, 2, 2]


@pytest.mark.parametrize(
    "platform, dtype, head, biased, name",
    [
        ("cpu", jnp.float32, 64, False, "head_by_head"),
        ("tpu", jnp.bfloat16, 72, False, "heads_first"),
        ("tpu", jnp.bfloat16, 72, True, "xla"),
        ("gpu", jnp.float32, 64, False, "xla"),
        ("cuda", jnp.bfloat16, 72, False, "cudnn"),
        ("gpu", jnp.float16, 128, False, "cudnn"),
        ("gpu", jnp.bfloat16, 68, False, "xla"),
        ("gpu", jnp.bfloat16, 136, False, "xla"),
        ("gpu", jnp.bfloat16, 64, True, "xla"),
    ],
)
def test_auto_takes_what_the_device_can(platform, dtype, head, biased, name):
    assert attention.chosen("auto", dtype, head, biased, platform) == name


def test_a_program_for_another_platform_is_named_beforehand():
    model = SiT(**SMALL, dtype="bfloat16")
    assert attention.of(model) == "head_by_head"  # on this CPU
    assert attention.settled(model, "tpu") == model.clone(attention="heads_first")
    assert MDT(**SMALL, dtype="bfloat16").biased  # and hence not for cuDNN


def test_an_unknown_program_lists_the_known_ones():
    with pytest.raises(UserError, match="'flash': choose one of auto, xla, cudnn, "):
        attention.attend(*inputs()[:3], by="flash")


@pytest.mark.parametrize(
    "platform, dtype, head, biased, found",
    [
        ("cpu", jnp.bfloat16, 64, False, "cpu, bfloat16, 64 and none"),
        ("gpu", jnp.float32, 64, False, "gpu, float32, 64 and none"),
        ("gpu", jnp.bfloat16, 68, False, "gpu, bfloat16, 68 and none"),
        ("gpu", jnp.bfloat16, 64, True, "gpu, bfloat16, 64 and a bias"),
    ],
)
def test_cudnn_is_refused_where_it_cannot_run(platform, dtype, head, biased, found):
    with pytest.raises(UserError, match=f"{found}: choose auto"):
        attention.chosen("cudnn", dtype, head, biased, platform)


@pytest.mark.parametrize("by", ["xla", "heads_first"])
def test_attention_scores_are_not_rounded_to_bfloat16(by):
    """Scores 256 and 257 over sqrt(2): in bfloat16 they would be 181 and 182."""
    array = lambda *rows: jnp.array(rows, jnp.bfloat16)[None, :, None]
    q, k, v = array([1, 1]), array([256, 0], [256, 1]), array([0, 0], [1, 1])
    exact = 1 / (1 + np.exp(-np.sqrt(0.5)))  # 0.670 against 0.731
    ours = attention.attend(q, k, v, by=by)
    assert ours.dtype == jnp.bfloat16
    assert abs(float(ours[0, 0, 0, 0]) - exact) < 4e-3  # result is one bfloat16


def test_attention_is_torchs():
    """scaled_dot_product_attention: scaled by one over the root of a head's width."""
    torch = pytest.importorskip("torch")
    q, k, v = inputs()[:3]
    by_head = (torch.tensor(x).transpose(1, 2) for x in (q, k, v))
    theirs = torch.nn.functional.scaled_dot_product_attention(*by_head).transpose(1, 2)
    # ten float32 operations deep, on either side
    assert relative(attention.attend(q, k, v), np.asarray(theirs)) < 1e-6


def test_the_gradient_of_q_k_and_v_is_put_together_not_summed():
    """As a sum of three arrays, each padded, a CPU reads and writes it nine times."""
    params, *given = noisy()
    net = lambda p: SiT(**SMALL).apply({"params": p}, *given).sum()
    traced = jax.make_jaxpr(jax.grad(net))(params)
    shape = (2, 16, 3, 3, 8)  # [B, T, (q k v), heads, values]
    made = [
        e.primitive.name for e in equations(traced) if e.outvars[0].aval.shape == shape
    ]
    assert "concatenate" in made and "pad" not in made
