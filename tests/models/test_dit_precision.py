"""What compute type, remat and unrolling change, and what they must not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.networks import SMALL, equations, noisy, quick_jit, shapes
from helpers.recorded import relative

from sit_jax.models import layers
from sit_jax.models.dit import SiT


@functools.cache
def output_and_gradient(**fields):
    model, (params, *inputs) = SiT(**SMALL, **fields), noisy()

    def loss(params):
        out = model.apply({"params": params}, *inputs)
        return jnp.square(out).mean(), out

    (_, out), slope = quick_jit(jax.value_and_grad(loss, has_aux=True))(params)
    return out, slope


# unroll=2 leaves a remainder of the three layers, unroll=3 no loop at all
@pytest.mark.parametrize("remat, unroll", [("full", 3), ("offload", 2)])
def test_remat_and_unroll_change_neither_output_nor_gradient(remat, unroll):
    out, slope = output_and_gradient()
    ours, ours_slope = output_and_gradient(remat=remat, unroll=unroll)
    # Other fusions, other rounding: a few float32 units in the last place.
    assert relative(ours, out) < 1e-6
    far = jax.tree.map(lambda a, b: relative(a, b) > 5e-6, ours_slope, slope)
    assert not any(jax.tree.leaves(far))


def gradient_program(**fields):
    model, (params, *inputs) = SiT(**SMALL, **fields), noisy()
    loss = lambda params: model.apply({"params": params}, *inputs).sum()
    return jax.make_jaxpr(jax.grad(loss))(params)


def test_remat_recomputes_what_its_name_says():
    names = {
        r: [e.primitive.name for e in equations(gradient_program(remat=r).jaxpr)]
        for r in layers.REMAT
    }
    products = {remat: found.count("dot_general") for remat, found in names.items()}
    # Kept products are not done twice: attention's two have no weights, the block has
    # seven, of which the last is never needed again.
    assert products["dots"] - products["none"] in (1, 2)
    assert products["full"] - products["none"] in (6, 7)
    assert products["offload"] == products["dots"]
    assert not any("remat" in n or "checkpoint" in n for n in names["none"])
    assert any("remat" in n or "checkpoint" in n for n in names["full"])
    moves = lambda remat: str(gradient_program(remat=remat)).lower().count("host")
    assert moves("offload") > 0 and moves("dots") == 0


def test_bfloat16_keeps_float32_where_it_matters():
    model, (params, *inputs) = SiT(**SMALL, dtype="bfloat16"), noisy()
    run = lambda p: model.apply(
        {"params": p}, *inputs, capture_intermediates=True, mutable="intermediates"
    )
    out, seen = jax.eval_shape(run, params)
    seen = seen["intermediates"]
    keys = jax.tree_util.tree_leaves_with_path(seen)
    name = lambda path: "/".join(str(k.key) for k in path if hasattr(k, "key"))
    dtypes = {name(k).removesuffix("/__call__"): str(x.dtype) for k, x in keys}
    half = {"patch", "blocks", "blocks/adaLN", "blocks/attn", "blocks/mlp"}
    half |= {"blocks/attn/qkv", "blocks/attn/proj", "blocks/mlp/fc1", "blocks/mlp/fc2"}
    assert out.dtype == jnp.float32
    assert {k for k, v in dtypes.items() if v == "bfloat16"} == half
    assert {v for k, v in dtypes.items() if k not in half} == {"float32"}


def test_bfloat16_runs_block_products_in_it_and_softmax_not():
    params, *inputs = noisy()

    def types(dtype):
        run = lambda p: SiT(**SMALL, dtype=dtype).apply({"params": p}, *inputs)
        found = equations(jax.make_jaxpr(run)(params).jaxpr)
        return [
            (e.primitive.name, str(e.invars[0].aval.dtype)) for e in found if e.invars
        ]

    lower, full = types("bfloat16"), types("float32")
    # adaLN, qkv, scores, values, proj, fc1, fc2; time in and out, head's adaLN and out
    assert lower.count(("dot_general", "bfloat16")) == 7
    assert lower.count(("dot_general", "float32")) == 4
    for name in ("exp", "reduce_max", "rsqrt", "cos", "sin", "logistic"):
        assert (name, "float32") in lower and (name, "bfloat16") not in lower
    assert not any(dtype == "bfloat16" for _, dtype in full)
    assert {str(s.dtype) for s in jax.tree.leaves(shapes(SiT(dtype="bfloat16")))} == {
        "float32"
    }


def test_bfloat16_is_near_float32():
    exact, slope = output_and_gradient()
    rough, rough_slope = output_and_gradient(dtype="bfloat16")
    # A bfloat16 has 8 bits, 4e-3; over three blocks that stays of this order.
    assert 1e-4 < relative(rough, exact) < 2e-2
    assert {str(g.dtype) for g in jax.tree.leaves(rough_slope)} == {"float32"}
    whole = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    assert relative(whole(rough_slope), whole(slope)) < 2e-2
