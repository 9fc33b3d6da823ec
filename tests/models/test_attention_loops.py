"""Attention whose heads take turns: how many at once, and what is kept."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import equations, exact, inputs, quick_jit
from helpers.recorded import relative

from sit_jax.models import attention, attention_cpu, attention_tpu
from sit_jax.models.layers import REMAT
from sit_jax.parallel.mesh import AXES


def scans(program):
    return [e for e in equations(program.jaxpr) if e.primitive.name == "scan"]


@pytest.mark.parametrize("most, length", [(0.5, [6]), (1, [6]), (2, [3]), (3, [])])
def test_heads_take_turns_together_as_the_scores_allow(most, length, monkeypatch):
    q, k, v, *_ = inputs(heads=6)
    size = 2 * 6 * 6 * 4  # of the scores of a head
    monkeypatch.setattr(attention_tpu, "SCORES_PER_TURN", most * size)
    program = jax.make_jaxpr(lambda *a: attention.heads_first(*a))(q, k, v)  # anew
    loops = scans(program)
    assert [e.params["length"] for e in loops] == length
    found = attention.heads_first(q, k, v)
    assert relative(found, exact(q, k, v)) < 1e-6


@pytest.mark.parametrize("chip, length", [("TPU v4", [4]), ("TPU v5p", [8])])
def test_a_v4_takes_more_heads_a_turn(chip, length, monkeypatch):
    monkeypatch.setattr(attention_tpu, "SCORES_PER_TURN", size := 2 * 6 * 6 * 4)
    monkeypatch.setitem(attention_tpu.SCORES_PER_TURN_OF, "TPU v4", 3 * size)
    device = jax.sharding.AbstractDevice(chip, 1, "tpu")
    mesh = jax.sharding.AbstractMesh((1, 1, 1), AXES, abstract_device=device)
    q, k, v, *_ = inputs(heads=8)
    with jax.sharding.use_abstract_mesh(mesh):
        program = jax.make_jaxpr(attention.heads_first)(q, k, v)
    loops = scans(program)
    assert [e.params["length"] for e in loops] == length


def test_small_scores_are_taken_at_once():
    q, k, v, *_ = inputs()
    assert not scans(jax.make_jaxpr(attention.head_by_head)(q, k, v))


def test_large_scores_are_taken_head_head_by_head_and_not_kept(monkeypatch):
    monkeypatch.setattr(attention_cpu, "CACHE", 2 * 3 * 6 * 6 * 4 - 1)
    q, k, v, *_ = inputs()
    slope = jax.grad(lambda q: attention.head_by_head(q, k, v).sum())
    program = jax.make_jaxpr(slope)(q)
    loops = scans(program)
    assert [e.params["length"] for e in loops] == [3, 3]
    handed_on = [x.aval.shape for x in loops[0].outvars]
    assert (3, 2, 6, 6) not in [s[:2] + s[-2:] for s in handed_on]


@pytest.mark.parametrize("by", ["head_by_head", "heads_first"])
@pytest.mark.parametrize(  # a bias for all or for each; a mask for none, all or each
    "biases, masks", [((1, 3), 1), ((2, 3), 3), ((1, 1), 0)]
)
def test_packed_attention_is_that_of_its_parts(by, biases, masks, loops_always):
    """Each head is read from where it is, and its gradient is written over it."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape, np.float32)
    qkv, bias = draw(2, 6, 3, 3, 4), draw(*biases, 6, 6)
    mask = rng.random((2, masks, 1, 6)) < 0.7 if masks else None
    if masks:
        mask[..., 0] = True  # who sees nothing has no meaningful gradient

    def packed(qkv, bias):
        return attention.packed_attention(qkv, bias, mask, implementation=by)

    def exactly(qkv, bias):
        return attention.xla(*(qkv[:, :, n] for n in range(3)), bias, mask)

    assert relative(packed(qkv, bias), exactly(qkv, bias)) < 1e-6
    loss = lambda f: lambda *a: jnp.square(f(*a)).sum()
    slopes = lambda f: quick_jit(jax.grad(loss(f), (0, 1)))(qkv, bias)
    for ours, usual in zip(slopes(packed), slopes(exactly), strict=True):
        assert relative(ours, usual) < 3e-6


@pytest.mark.parametrize("by", ["head_by_head", "heads_first"])
def test_gradients_are_written_over_what_they_are_of(by, loops_always):
    """What a loop stacks begins as zeros; what it carries on does not."""
    loss = lambda *a: jnp.square(attention.attention(*a, implementation=by)).sum()
    program = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*inputs()[:3])
    loops = scans(program)
    backward = loops[-1]
    assert len(backward.outvars) == backward.params["num_carry"]


@pytest.mark.parametrize("by", ["head_by_head", "heads_first"])
def test_the_gradient_inherits_the_precision(by, loops_always):
    """Of what stands around attention alone, as it does around a sampled network."""

    def exactly(*a):
        with jax.default_matmul_precision("highest"):
            return attention.attention(*a, implementation=by).sum()

    traced = jax.jit(jax.grad(exactly, (0, 1, 2))).trace(*inputs()[:3])
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    found = re.findall(r"stablehlo.dot_general.*precision = \[(\w+), (\w+)\]", text)
    assert set(found) == {("HIGHEST", "HIGHEST")}
    assert len(found) == text.count("stablehlo.dot_general") >= 5


def test_kept_results_spare_the_loop_forward_a_second_time(loops_always):
    q, k, v, *_ = inputs()

    def loops(policy):
        run = jax.checkpoint(attention.head_by_head, policy=policy)
        slope = jax.grad(lambda q: jnp.square(run(q, k, v)).sum())
        return len(scans(jax.make_jaxpr(slope)(q)))

    assert loops(REMAT["dots"]) == 2
    assert loops(REMAT["full"]) == 3


def test_head_by_head_sums_bfloat16_in_float32(loops_always):
    given = [jnp.asarray(x, jnp.bfloat16) for x in inputs(length=40, keys=40)[:3]]

    def slopes(by, given):
        loss = lambda *a: (
            attention.attention(*a, implementation=by).astype(jnp.float32).sum()
        )
        return quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(*given)

    exactly = slopes("xla", [x.astype(jnp.float32) for x in given])
    found = (slopes("head_by_head", given), slopes("xla", given), exactly)
    for ours, usual, true in zip(*found, strict=True):
        assert ours.dtype == jnp.bfloat16
        far, usually = (relative(x.astype(jnp.float32), true) for x in (ours, usual))
        # no further from the slopes in float32 than the usual program is
        assert far < max(1.5 * usually, 4e-3)
