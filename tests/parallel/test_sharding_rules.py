"""Which mesh axes split which weights, and that nothing is held twice unsaid."""

import re
from functools import partial

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from sit_jax.models.dit import SiT
from sit_jax.models.mdt import MDT, MDTv2
from sit_jax.parallel import sharding_rules
from sit_jax.parallel.mesh import abstract_mesh, make_mesh
from sit_jax.planning.memory import NOTABLE
from sit_jax.training.state import TrainState, init_params

WEIGHTS, ALL = ("fsdp", "tensor"), ("fsdp", "tensor", "data")


def sizes(data=1, fsdp=1, tensor=1):
    return {"data": data, "fsdp": fsdp, "tensor": tensor}


def spec(name, shape, axes=WEIGHTS, **mesh):
    return sharding_rules.choose_spec(name, shape, sizes(**mesh), axes)


BOTH = ("fsdp", "tensor")


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("blocks/attn/qkv/kernel", (28, 1152, 3456), (None, BOTH, None)),
        ("blocks/mlp/fc1/kernel", (28, 1152, 4608), (None, "fsdp", "tensor")),
        ("blocks/mlp/fc2/kernel", (28, 4608, 1152), (None, "tensor", "fsdp")),
        ("blocks/attn/proj/kernel", (28, 1152, 1152), (None, "tensor", "fsdp")),
        ("head/adaLN/kernel", (1152, 2304), (BOTH, None)),
        ("cond/label/embedding", (1001, 1152), (None, BOTH)),
        # adapters: not in the table, and split along all but the rank
        ("blocks/attn/qkv/kernel/down", (28, 1152, 16), (None, BOTH, None)),
        ("blocks/attn/qkv/kernel/up", (28, 16, 3456), (None, None, BOTH)),
        ("patch/kernel", (2, 2, 4, 1152), (None, None, None, BOTH)),
    ],
)
def test_choose_spec_follows_the_table(name, shape, expected):
    assert spec(name, shape, fsdp=8, tensor=2) == (P(*expected), ())
    fsdp_alone = ["fsdp" if axes in ("fsdp", BOTH) else None for axes in expected]
    assert spec(f"opt_state/0/mu/{name}", shape, fsdp=16) == (P(*fsdp_alone), ())


def test_optimizer_and_averages_are_split_over_replicas_too():
    kernel = "ema/blocks/attn/qkv/kernel", (28, 1152, 3456)
    assert spec(*kernel, data=8) == (P(None, None, None), ())  # as weights are
    assert spec(*kernel, axes=ALL, data=8) == (P(None, None, "data"), ())
    both = P(None, "fsdp", "data")
    assert spec(*kernel, axes=ALL, data=2, fsdp=128) == (both, ())


def test_choose_spec_takes_the_next_best_axis_that_divides():
    name, shape = "blocks/mlp/fc1/kernel", (2, 1152, 4608)
    assert spec(name, shape, fsdp=256) == (P(None, None, "fsdp"), ())  # 1152 / 256
    both = P(None, "tensor", "fsdp")
    assert spec(name, shape, fsdp=256, tensor=3) == (both, ())


def test_choose_spec_names_axes_that_nothing_divides():
    name, shape = "blocks/attn/qkv/kernel", (28, 1152, 3456)
    assert spec(name, shape, fsdp=256) == (P(None, None, None), ("fsdp",))
    tree = {"blocks": {"attn": {"qkv": {"kernel": np.zeros((2, 144, 432))}}}}
    left = [("blocks/attn/qkv/kernel", (2, 144, 432), ("fsdp",))]
    unsharded = lambda *mesh: sharding_rules.unsharded_arrays(
        abstract_mesh(*mesh), tree
    )
    assert unsharded(256) == unsharded(256, 2) == left and not unsharded(256, 16)


def test_choose_spec_splits_unknown_arrays_along_their_longest_axis():
    assert spec("table", (64, 1024), fsdp=8) == (P(None, "fsdp"), ())
    assert spec("blocks/w", (1024, 64, 512), fsdp=8) == (P(None, None, "fsdp"), ())
    # as of an optimizer that keeps another shape than the weight's
    factored = "opt_state/v_row/blocks/attn/qkv/kernel", (8, 4096)
    assert spec(*factored, fsdp=8) == (P(None, "fsdp"), ())


def test_choose_spec_holds_small_arrays_whole():
    assert spec("table", (2**14,), fsdp=8) == (P(), ())
    assert spec("table", (2**15,), fsdp=8) == (P("fsdp"), ())


@pytest.mark.parametrize("network", [SiT, MDT, MDTv2])
def test_rules_name_every_weight_of_an_xl(network):
    init = partial(init_params, network(), (32, 32, 4))
    shapes = jax.eval_shape(init, jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        layers = 1 if "blocks" in name else 0
        if leaf.ndim - layers > 1 and not name.endswith("hidden_token"):
            assert any(re.search(rule, name) for rule, _ in sharding_rules.RULES), name
    # 128 divides every width of the releases; what is left has 7 MB at most
    left = sharding_rules.unsharded_arrays(abstract_mesh(512, data=4), shapes)
    assert all(np.prod(shape) * 4 < NOTABLE for _, shape, _ in left)


def test_arrays_hold_what_the_table_says():
    """ZeRO-1: replicas have the weights whole, all else once between them."""
    model = SiT(depth=2, width=64, heads=4, patch=2, classes=5)
    mesh = make_mesh(data=2, fsdp=4)
    init = partial(init_params, model, (8, 8, 4))
    begin = lambda key: TrainState.create(init(key), optax.adamw(1e-3))
    shapes = jax.eval_shape(begin, jax.random.key(0))
    where = sharding_rules.state_shardings(mesh, shapes)
    state = jax.jit(begin, out_shardings=where)(jax.random.key(0))
    held = lambda x: {shard.data.size for shard in x.addressable_shards}
    kernel = state.params["blocks"]["mlp"]["fc1"]["kernel"]
    assert held(kernel) == {kernel.size // 4}
    for other in (state.ema["ema"], state.opt_state[0].mu, state.opt_state[0].nu):
        assert held(other["blocks"]["mlp"]["fc1"]["kernel"]) == {kernel.size // 8}
