"""Attention's programs: equal numbers, and each only where it can run."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import SMALL, equations, exact, inputs, noisy, quick_jit
from helpers.recorded import relative

from sit_jax.adapters.apply import apply_model
from sit_jax.adapters.weights import Int8Weight
from sit_jax.errors import UserError
from sit_jax.models import attention
from sit_jax.models.dit import SiT
from sit_jax.models.mdt import MDT


@pytest.mark.parametrize("n", [3, 5])  # without and with a bias and a mask
@pytest.mark.parametrize("by", ["xla", "head_by_head", "heads_first"])
def test_every_program_computes_the_formula(by, n, loops_always):
    q, k, v, *more = inputs()[:n]
    out = attention.attention(q, k, v, *more, implementation=by)
    # ten float32 operations deep
    assert relative(out, exact(q, k, v, *more)) < 1e-6


@pytest.mark.parametrize("by", ["head_by_head", "heads_first"])
def test_loops_have_the_same_derivatives(by, loops_always):
    *given, mask = inputs(keys=5)

    def grads(by):
        run = partial(attention.attention, implementation=by)
        loss = lambda *a: jnp.square(run(*a, mask)).sum()
        return quick_jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*given)

    for ours, theirs in zip(grads(by), grads("xla"), strict=True):
        assert relative(ours, theirs) < 3e-6


@pytest.mark.parametrize("form", ["floats", "int8"])
def test_a_network_computes_alike_in_either_layout(form):
    """Also where a weight's product is taken outside of its layer."""
    params, *given = noisy()
    if form == "int8":
        params = jax.tree.map(lambda x: x, params)  # others share it
        kernel = params["blocks"]["attn"]["qkv"]["kernel"]
        params["blocks"]["attn"]["qkv"]["kernel"] = Int8Weight.from_float(kernel)
    run = lambda by: apply_model(SiT(**SMALL, attention=by), params, *given)
    assert relative(run("heads_first"), run("xla")) < 1e-6  # some 30 operations deep


def residual_bytes(model, *inputs):
    """Bytes that the forward pass keeps for the backward pass."""
    keep = lambda params: jax.vjp(
        lambda p: model.apply({"params": p}, *inputs), params
    )[1]
    kept = jax.eval_shape(keep, noisy()[0])
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))


def test_remat_dots_keeps_the_results_of_tpu_attention():
    """Of every layer, image and token the width; scores are computed again."""
    _, *inputs = noisy()
    model = SiT(**SMALL, remat="dots", attention="xla")
    xla, ours = (
        residual_bytes(model.clone(attention=name), *inputs)
        for name in ("xla", "heads_first")
    )
    assert ours - xla == 4 * model.depth * 2 * 16 * model.width


def test_the_field_reaches_every_block(loops_always):
    params, *given = noisy()

    def loops(by):
        run = lambda p: SiT(**SMALL, attention=by).apply({"params": p}, *given)
        found = equations(jax.make_jaxpr(run)(params).jaxpr)
        return sum(e.primitive.name == "scan" for e in found)

    found = [loops(by) for by in ("xla", "head_by_head", "heads_first")]
    assert found == [1, 2, 2]


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
    choose = partial(attention.choose_attention, has_bias=biased, platform=platform)
    assert choose("auto", dtype, head) == name


def test_a_program_for_another_platform_is_named_beforehand():
    model = SiT(**SMALL, dtype="bfloat16")
    assert attention.attention_name(model) == "head_by_head"  # on this CPU
    assert attention.resolve_attention(model, "tpu") == model.clone(
        attention="heads_first"
    )
    assert MDT(**SMALL, dtype="bfloat16").has_attention_bias  # and hence not for cuDNN


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
    choose = partial(attention.choose_attention, has_bias=biased, platform=platform)
    with pytest.raises(UserError, match=f"{found}: choose auto"):
        choose("cudnn", dtype, head)


@pytest.mark.parametrize("by", ["xla", "heads_first"])
def test_attention_scores_are_not_rounded_to_bfloat16(by):
    """Scores 256 and 257 over sqrt(2): in bfloat16 they would be 181 and 182."""
    array = lambda *rows: jnp.array(rows, jnp.bfloat16)[None, :, None]
    q, k, v = array([1, 1]), array([256, 0], [256, 1]), array([0, 0], [1, 1])
    exact = 1 / (1 + np.exp(-np.sqrt(0.5)))  # 0.670 against 0.731
    ours = attention.attention(q, k, v, implementation=by)
    assert ours.dtype == jnp.bfloat16
    assert abs(float(ours[0, 0, 0, 0]) - exact) < 4e-3  # result is one bfloat16


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
