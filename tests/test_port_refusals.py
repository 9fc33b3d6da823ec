"""Weights that do not fit are refused in one line that names every misfit."""

import numpy as np
import pytest
from networks import random_state, shapes

from sit_jax.convert import port
from sit_jax.errors import UserError
from sit_jax.models.dit import RULES, SiT


@pytest.mark.parametrize(
    "gone, named",
    [
        (["final_layer.linear.bias"], "final_layer.linear.bias"),
        (["blocks.1.mlp.fc2.bias"], "blocks.1.mlp.fc2.bias"),
        (["blocks.2.mlp.fc2.bias"], "blocks.2.mlp.fc2.bias"),  # of the last layer
    ],
)
def test_missing_entries_are_listed(gone, named):
    state = {k: v for k, v in random_state(depth=3).items() if k not in gone}
    with pytest.raises(UserError, match=f"weights lack {named}: "):
        port.to_flax(RULES, state)


def test_gap_in_the_layers_is_listed():
    state = random_state(depth=3)
    for name in [name for name in state if name.startswith("blocks.1.")]:
        del state[name]
    with pytest.raises(
        UserError, match="blocks.1.attn.qkv.weight.* and 2 more"
    ) as error:
        port.to_flax(RULES, state)
    assert "\n" not in str(error.value)


def test_nothing_at_all_is_a_missing_layer_0():
    with pytest.raises(UserError, match="x_embedder.proj.weight.*more"):
        port.to_flax(RULES, {})


@pytest.mark.parametrize(
    "name, array, message",
    [
        ("blocks.1.mlp.fc1.bias", np.zeros(3, np.float32), "float32.3,. is not like"),
        ("blocks.1.mlp.fc1.bias", np.zeros(64, np.float16), "float16.64,. is not like"),
        ("x_embedder.proj.weight", np.zeros((16, 16), np.float32), "has not 4 axes"),
    ],
)
def test_misshapen_entries_are_listed(name, array, message):
    state = random_state() | {name: array}
    with pytest.raises(UserError, match=f"{name} .*{message}"):
        port.to_flax(RULES, state)


def test_unknown_entries_are_handed_back():
    state = random_state() | {"blocks.0.attn.q_norm.weight": np.ones(8)}
    _, spare = port.to_flax(RULES, state)
    assert spare == {"pos_embed", "blocks.0.attn.q_norm.weight"}


def test_another_architecture_is_refused_with_every_difference():
    params, _ = port.to_flax(RULES, random_state(depth=2))
    params["extra"] = {"kernel": np.zeros(2)}
    del params["head"]["out"]["bias"]
    model = SiT(depth=3, width=16, heads=2, classes=3)
    with pytest.raises(UserError) as error:
        port.require_match(shapes(model, 8), params)
    line = str(error.value)
    assert "missing: head/out/bias;" in line and "extra: extra/kernel;" in line
    assert "blocks/mlp/fc1/bias (2, 64) instead of (3, 64)" in line and "\n" not in line


def test_to_torch_drops_no_leaf_in_silence():
    params, _ = port.to_flax(RULES, random_state())
    with pytest.raises(UserError, match="do not share hidden"):
        port.to_torch(RULES, params | {"hidden": np.zeros(2)})
    with pytest.raises(UserError, match="do not share patch/bias, patch/kernel"):
        port.to_torch(RULES, {k: v for k, v in params.items() if k != "patch"})


def test_to_torch_refuses_stacks_of_unequal_height():
    params, _ = port.to_flax(RULES, random_state())
    params["blocks"]["adaLN"]["bias"] = np.zeros((3, 96))
    with pytest.raises(UserError, match="blocks/adaLN/bias has 3 layers, not 2"):
        port.to_torch(RULES, params)
