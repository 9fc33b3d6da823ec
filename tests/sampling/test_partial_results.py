"""Batches on disk: whole ones are used, others are named and made again."""

import json

import numpy as np
import pytest

from sit_jax.errors import UserError
from sit_jax.sampling.partial_results import (
    MARK,
    PartialResults,
    is_begun,
    parts_mark,
    parts_size,
    remove_parts,
)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "x.npz"


def some(batch):
    return {"images": np.full((3, 4), batch), "evaluations": np.arange(3)}


@pytest.fixture
def parts(out):
    parts = PartialResults(out, "abc", writes=[out])
    for batch in range(4):
        parts.save(batch, some(batch))
    return parts


def test_they_come_back_as_they_were(parts, out):
    again = PartialResults(out, "abc")
    assert again.check(6) == [4, 5]
    for batch in range(4):
        found = again.read(batch)
        assert found.keys() == some(batch).keys()
        for name, array in some(batch).items():
            np.testing.assert_array_equal(found[name], array)
    assert parts_size(out) == sum(p.stat().st_size for p in again.folder.glob("*.npz"))


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_is_noticed_or_does_no_harm(parts, capsys, seed):
    rng = np.random.default_rng(seed)
    path = parts.folder / "000002.npz"
    data = bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    path.write_bytes(data)
    if parts.check(4):
        assert parts.missing(4) == [2] and not path.exists()
        said = capsys.readouterr().err
        assert (
            said.startswith(f"WARNING: {path} is damaged (") and said.count("\n") == 1
        )
    else:  # a date or a permission in the zip's own records
        np.testing.assert_array_equal(parts.read(2)["images"], some(2)["images"])


def test_half_of_one_another_ones_and_a_renamed_one_are_made_again(parts, out, capsys):
    half, foreign, renamed = (parts.folder / f"00000{i}.npz" for i in (0, 1, 3))
    half.write_bytes(half.read_bytes()[:-40])
    other = PartialResults(out.with_name("y"), "def")
    other.save(1, some(1))
    foreign.write_bytes((other.folder / foreign.name).read_bytes())
    renamed.write_bytes((parts.folder / "000002.npz").read_bytes())
    (parts.folder / ".000004.77.npz").touch()  # a draft that a kill has left
    assert parts.check(4) == [0, 1, 3]
    lines = capsys.readouterr().err.splitlines()
    ends = [line.rpartition(".npz ")[2] for line in lines]
    assert "is damaged" in ends[0]
    assert ends[1:] == ["belongs to another run: it is removed and made again"] * 2
    assert sorted(path.name for path in parts.folder.iterdir()) == ["000002.npz", MARK]


def test_of_another_digest_they_are_refused_or_go(parts, out, capsys):
    with pytest.raises(UserError, match="x.npz.parts holds parts of other samples"):
        PartialResults(out, "def")
    assert PartialResults(out, "abc").missing(4) == []
    assert PartialResults(out, "def", overwrite=True).missing(4) == [0, 1, 2, 3]
    said = capsys.readouterr().err
    assert (
        said
        == f"WARNING: {parts.folder} holds parts of another run, which are removed\n"
    )


@pytest.mark.parametrize("mark", ["{", "[]", json.dumps({"digest": 3})])
def test_a_mark_that_says_nothing_makes_nobodys_parts(parts, out, mark):
    parts_mark(out).write_text(mark)
    with pytest.raises(UserError, match="parts of other samples"):
        PartialResults(out, "abc")


def test_a_folder_that_only_has_the_name_is_left_alone(parts, out):
    (parts.folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="holds thesis.tex, which is no part"):
        PartialResults(out, "def", overwrite=True)
    assert (parts.folder / "thesis.tex").exists() and parts.missing(4) == []


def test_what_an_unfinished_run_has_written_is_known(parts, out, monkeypatch):
    monkeypatch.chdir(out.parent)
    assert is_begun(out, out) and is_begun("x.npz", "x.npz")
    assert not is_begun(out, out.with_name("y.npz"))
    remove_parts(out)
    assert not is_begun(out, out) and not parts.folder.exists()
