"""Adapters of a fused qkv, cut in three and joined."""

import numpy as np
from helpers.adapters import pair

from sit_jax.convert import peft


def whole(pair):
    return pair.scale * pair.lora_b @ pair.lora_a


def test_cutting_qkv_is_exact_and_joining_undoes_it():
    fused = {"blocks.3.attn.qkv": pair(2, out=12), "blocks.3.mlp.fc1": pair(2, seed=1)}
    cut = peft.to_diffusers(fused)
    names = [f"transformer_blocks.3.attn1.to_{part}" for part in "qkv"]
    assert list(cut) == [*names, "transformer_blocks.3.ff.net.0.proj"]
    rows = np.split(whole(fused["blocks.3.attn.qkv"]), 3)
    for name, row in zip(names, rows, strict=True):
        np.testing.assert_array_equal(whole(cut[name]), row)
    again = peft.from_diffusers(cut)
    for name, one in fused.items():
        np.testing.assert_array_equal(again[name].lora_a, one.lora_a)
        np.testing.assert_array_equal(again[name].lora_b, one.lora_b)


def test_joining_three_of_their_own_adds_the_ranks():
    parts = {
        f"transformer_blocks.0.attn1.to_{name}": pair(rank, 4, seed=i, scale=0.5)
        for i, (name, rank) in enumerate({"q": 1, "k": 2, "v": 3}.items())
    }
    (fused,) = peft.from_diffusers(parts).values()
    assert fused.rank == 6 and fused.scale == 0.5
    rows = np.concatenate([whole(part) for part in parts.values()])
    np.testing.assert_allclose(whole(fused), rows, rtol=1e-6, atol=1e-7)
    del parts["transformer_blocks.0.attn1.to_k"]
    (fused,) = peft.from_diffusers(parts).values()
    assert fused.rank == 4 and not whole(fused)[4:8].any()
