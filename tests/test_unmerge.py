"""Adapters taken out of the weights that they were merged into."""

import numpy as np
import pytest
import small
from flax.traverse_util import flatten_dict
from lora_runs import saved
from recorded import relative

import port_weights
from sit_jax import checkpoint
from sit_jax.adapters.lora import TABLE
from sit_jax.convert.weights import open_weights
from sit_jax.experiment import recipe
from sit_jax.parallel.sharding import make_mesh


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small.checkpoint(tmp_path_factory.mktemp("base"), small.config())


@pytest.fixture
def port(monkeypatch, capsys):
    return lambda *words: small.called(port_weights.main, monkeypatch, capsys, *words)


def flat(path):
    opened = open_weights(path, None)
    mesh = make_mesh(data=-1, fsdp=1)
    params = opened.load("ema", recipe(opened.config), mesh)
    return {name: np.asarray(x) for name, x in flatten_dict(params, sep="/").items()}


def run(base, tmp_path, name="run", **adapter):
    """-> a run of adapters, and its weights merged into the base."""
    return saved(tmp_path / name, base, **adapter), tmp_path / f"{name}-merged"


def test_what_was_merged_comes_out_again(base, tmp_path, port):
    """Two roundings of float32, without the new rows; from the run or PEFT's files."""
    adapters, merged = run(
        base, tmp_path, new_classes=2, targets="blocks/(attn/qkv|mlp/fc2)/kernel"
    )
    assert port(adapters, merged, "--adapter", "merged")[0] == 0
    assert flat(merged)[TABLE].shape == (8, 16)
    assert port(adapters, tmp_path / "files", "--adapter", "peft")[0] == 0
    plain = flat(base)
    for i, words in enumerate((adapters, tmp_path / "files")):
        code, out, err = port(merged, tmp_path / f"out{i}", "--unmerge", words)
        assert code == 0, err
        assert str(tmp_path / f"out{i}" / "0") in out
        found = flat(tmp_path / f"out{i}")
        assert found.keys() == plain.keys()
        for name, weight in plain.items():
            assert relative(found[name], weight) < 2e-7, name
    moved = flat(merged)["blocks/attn/qkv/kernel"]
    assert relative(moved, plain["blocks/attn/qkv/kernel"]) > 0.01
    meta = checkpoint.read_meta(*checkpoint.find_step(tmp_path / "out0"))
    assert meta["unmerged"]["path"] == str(base) and "merged" not in meta
    code, _, err = port(tmp_path / "out0", tmp_path / "x", "--unmerge", adapters)
    assert code == 2 and "names no adapters merged into it" in err


def test_only_what_was_merged_is_taken_out(base, tmp_path, port):
    other = small.checkpoint(tmp_path / "other", small.config(seed=1))
    parts = recipe(small.config())
    weights = small.random_params(parts, 3)
    meta = checkpoint.read_meta(*checkpoint.find_step(other))
    small.save(tmp_path / "another", 9, meta, params=weights, ema=weights)
    one, merged = run(base, tmp_path)
    assert port(one, merged, "--adapter", "merged")[0] == 0
    two = saved(tmp_path / "two", base, seed=1)
    foreign = saved(tmp_path / "foreign", tmp_path / "another")
    told = [
        ((base, "--unmerge", one), "names no adapters merged into it"),
        ((merged, "--unmerge", two), f"two is not in {merged}/0: it is "),
        ((merged, "--unmerge", foreign), "belongs to other weights ("),
        ((merged, "--unmerge", base), "no adapters: use --weights"),
        ((merged, "--unmerge", "nowhere"), "nowhere; it holds no step"),
        ((merged, "--unmerge", one, "--adapter", "peft"), "one at a time"),
        ((merged, "--unmerge", one, "--to", "diffusers"), "--to diffusers is for a"),
    ]
    for (source, *words), line in told:
        code, _, err = port(source, tmp_path / "out", *words)
        assert code == 2 and line in err and err.count("\n") == 1, err
        assert not (tmp_path / "out").exists()


def test_lengths_do_not_come_out(base, tmp_path, port):
    adapters, merged = run(base, tmp_path, dora=True)
    assert port(adapters, merged, "--adapter", "merged")[0] == 0
    code, _, err = port(merged, tmp_path / "out", "--unmerge", adapters)
    assert code == 2 and "has lengths (DoRA)" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
