"""quantize.py: a checkpoint of int8 is made, read, sampled from, and refused."""

import re

import jax
import numpy as np
import pytest
from helpers import small
from helpers.small import called

from sit_jax.adapters.quantize import SKIP, quantize_params
from sit_jax.adapters.weights import Int4Weight
from sit_jax.checkpoint import find_step, read_meta
from sit_jax.cli import port_weights, quantize, sample
from sit_jax.convert.open import WeightsRef
from sit_jax.experiment import build_experiment
from sit_jax.files import read_json


@pytest.fixture
def run(monkeypatch, capsys):
    return lambda *words: called(quantize.main, monkeypatch, capsys, *words)


@pytest.fixture(scope="module")
def floats(tmp_path_factory):
    return small.checkpoint(tmp_path_factory.mktemp("floats") / "ck", small.config())


def test_a_checkpoint_is_made_and_read_back(floats, tmp_path, run, monkeypatch, capsys):
    code, out, err = run(floats, tmp_path / "q", "--form", "w4g8")
    assert (code, err) == (0, ""), err
    assert re.search(r"blocks/mlp/fc1/kernel +8,192 +\d,\d+ +\d.\d+e-0[12]", out)
    opened = WeightsRef(tmp_path / "q").open()
    parts = build_experiment(opened.config)
    from sit_jax.parallel.mesh import make_mesh

    params = opened.load("ema", parts, make_mesh(data=-1, fsdp=1))
    wanted = quantize_params(small.random_params(parts, 10), "w4g8", SKIP)
    jax.tree.map(np.testing.assert_array_equal, params, wanted)
    assert isinstance(params["blocks"]["mlp"]["fc1"]["kernel"], Int4Weight)
    assert read_meta(*find_step(tmp_path / "q"))["from"] == str(floats)
    # no torch file, and not twice
    words = (tmp_path / "q", tmp_path / "x.pt")
    code, _, err = called(port_weights.main, monkeypatch, capsys, *words)
    assert code == 2 and f"what it was made from: {floats}" in err
    code, _, err = run(tmp_path / "q", tmp_path / "r")
    assert code == 2 and "is w4g8 already" in err


def test_samples_say_how_their_weights_were_stored(
    floats, tmp_path, monkeypatch, capsys
):
    """Quantized on the way or beforehand, the images are the same."""
    draw = lambda *words: called(sample.main, monkeypatch, capsys, *words)
    common = ("--num", 2, "--labels", "1,2", "--guidance", 1)
    made = ("--weights", floats, "--out", tmp_path / "a.npy", "--quantize", "w8a8")
    assert draw(*made, *common)[0] == 0
    record = read_json(tmp_path / "a.npy.manifest.json")
    assert record["job"]["quantize"] == "w8a8"
    quantize_words = (floats, tmp_path / "q", "--form", "w8a8")
    assert called(quantize.main, monkeypatch, capsys, *quantize_words)[0] == 0
    stored = ("--weights", tmp_path / "q", "--out", tmp_path / "b.npy")
    assert draw(*stored, *common)[0] == 0
    np.testing.assert_array_equal(
        np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy")
    )
    code, _, err = draw(
        *stored[:2], *common, "--out", tmp_path / "c.npy", "--quantize", "w8"
    )
    assert code == 2 and "is in another form already" in err
    code, _, err = draw(
        *made[:2], *common, "--out", tmp_path / "c.npy", "--quantize", "w3"
    )
    assert code == 2 and "'w3' is no form" in err
    assert not (tmp_path / "c.npy").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["FLOATS", "OUT", "--form", "w5"], "'w5' is no form"),
        (["nowhere", "OUT"], "no weights at nowhere"),
        (["FLOATS", "FLOATS"], "exists; --overwrite"),
        (["FLOATS", "OUT", "--config.seed=1"], "unknown argument '--config.seed=1'"),
    ],
)
def test_wrong_use_is_one_line(floats, tmp_path, run, words, said):
    places = {"FLOATS": floats, "OUT": tmp_path / "out"}
    code, _, err = run(*(places.get(word, word) for word in words))
    assert code == 2 and said in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()
