"""New classes by adapters: rows of the label table, sampled, refused, numbered."""

import jax
import numpy as np
import pytest
from helpers import small
from helpers.adapters import saved

from sit_jax import checkpoint
from sit_jax.adapters.quantize import SKIP, quantize_params
from sit_jax.adapters.weights import LABEL_TABLE, materialize, merge_adapters
from sit_jax.cli import port_weights, sample
from sit_jax.convert.adapters import apply_adapters, count_new_classes
from sit_jax.convert.open import CheckpointWeights, WeightsRef, load_adapted
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment
from sit_jax.parallel.mesh import make_mesh

PARTS = build_experiment(small.config())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small.checkpoint(tmp_path_factory.mktemp("base"), small.config())


@pytest.fixture(scope="module")
def more(tmp_path_factory, base):
    """Adapters with two new classes."""
    return saved(tmp_path_factory.mktemp("more") / "run", base, new_classes=2)


@pytest.fixture(scope="module")
def table(tmp_path_factory, base):
    """Adapters of a label table of five classes."""
    workdir = tmp_path_factory.mktemp("table") / "run"
    return saved(workdir, base, seed=1, targets=LABEL_TABLE)


@pytest.fixture
def called(monkeypatch, capsys):
    return lambda script, *words: small.called(script.main, monkeypatch, capsys, *words)


def params(base):
    directory, step = checkpoint.find_step(base)
    return WeightsRef(base).open().load("ema", PARTS, make_mesh(data=-1, fsdp=1))


def worn(base, *words):
    return apply_adapters(
        params(base), [str(word) for word in words], PARTS.model, None
    )


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def own(run):
    """The weights of a run of adapters by itself."""
    directory, step = checkpoint.find_step(run)
    parts = build_experiment(WeightsRef(run).open().config)
    weights = CheckpointWeights(directory, step)
    return merge_adapters(load_adapted(parts, make_mesh(), weights, "ema")[0])


BOTH = pytest.param(f"{LABEL_TABLE}|blocks/.*", marks=pytest.mark.slow)


@pytest.mark.parametrize("targets", ["blocks/attn/qkv/kernel", BOTH])
def test_new_rows_come_with_their_adapters(base, tmp_path, targets):
    """Also where the table itself is adapted: the same weights as the run alone."""
    run = saved(tmp_path / "run", base, new_classes=2, targets=targets)
    found, records = worn(base, run)
    equal(found, own(run))
    assert found["cond"]["label"]["embedding"].shape == (8, 16)
    assert [each["new_classes"] for each in records] == [2]
    assert count_new_classes([f"{run}:0.5"], WeightsRef(base).open()) == 2


def test_rows_are_whole_at_any_weight(base, more):
    whole, half = (worn(base, f"{more}:{w}")[0] for w in (1, 0))
    names = "cond", "label", "embedding"
    for name in names:
        whole, half = whole[name], half[name]
    np.testing.assert_array_equal(whole, half)


def test_an_adapter_of_the_old_table_goes_below_new_rows(base, more, table):
    """In whichever order they are given."""
    found = [worn(base, *words)[0] for words in ((more, table), (table, more))]
    equal(*found)
    rows = np.asarray(found[0]["cond"]["label"]["embedding"])
    old = np.asarray(own(table)["cond"]["label"]["embedding"])
    np.testing.assert_array_equal(np.delete(rows, (5, 6), axis=0), old)


def test_two_that_bring_classes_are_refused(base, more):
    with pytest.raises(UserError, match="both add classes to the label table") as told:
        worn(base, more, f"{more}:0.5")
    assert "\n" not in str(told.value)


def test_new_classes_are_sampled_over_their_base(called, base, more, tmp_path):
    draw = lambda out, *words: called(sample, "--out", tmp_path / out, *words)
    words = ("--weights", base, "--lora", more)
    code, _, err = draw("a.npy", *words, "--labels", "6,0")
    assert code == 0, err
    code, _, err = draw("b.npy", "--weights", more, "--labels", "6,0")
    assert code == 0, err
    np.testing.assert_array_equal(*(np.load(tmp_path / f"{x}.npy") for x in "ab"))
    code, _, err = draw("c.npy", *words, "--labels", "7")
    assert code == 2 and "7 is not a class; there are 0..6" in err
    code, _, err = draw("c.npy", "--weights", base, "--labels", "5")
    assert code == 2 and "5 is not a class; there are 0..4" in err
    assert not (tmp_path / "c.npy").exists()


def test_pefts_files_bring_their_rows_too(called, base, more, tmp_path):
    """The whole table is in them, and its old rows must be the base's."""
    assert called(port_weights, more, tmp_path / "f", "--adapter", "peft")[0] == 0
    equal(worn(base, tmp_path / "f")[0], worn(base, more)[0])
    other = jax.tree.map(lambda w: w + 1, params(base))
    with pytest.raises(UserError, match="rows of the label table that the base has"):
        apply_adapters(other, [str(tmp_path / "f")], PARTS.model, None)


def test_an_adapted_table_with_new_rows_is_not_pefts(called, base, tmp_path):
    run = saved(tmp_path / "run", base, new_classes=1, targets=LABEL_TABLE)
    code, _, err = called(port_weights, run, tmp_path / "f", "--adapter", "peft")
    assert code == 2 and "both adapted and longer by 1 rows" in err
    assert not (tmp_path / "f").exists()


@pytest.mark.slow  # quantizes a network
def test_int8_weights_take_new_rows(base, more, tmp_path):
    weights = quantize_params(params(base), "w8a8", SKIP)
    found, _ = apply_adapters(weights, [str(more)], PARTS.model, None)
    assert found["cond"]["label"]["embedding"].shape == (8, 16)
    node = found["blocks"]["attn"]["qkv"]["kernel"]
    assert node.base.codes.dtype == "int8"
    assert np.isfinite(np.asarray(materialize(node))).all()
