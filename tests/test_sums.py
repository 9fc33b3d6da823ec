"""What happens to a checkpoint's files is noticed before they are used."""

import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import small
from conftest import ROOT

from sit_jax.checkpoint import Damaged, has_sums, leaves, load, read_meta, require_whole
from sit_jax.checkpoint.__main__ import main
from sit_jax.checkpoint.sums import SUMS, damages

TREE = {"w": np.arange(6000, dtype=np.float32).reshape(60, 100), "b": np.ones(3)}
SHAPES = jax.eval_shape(lambda: TREE)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """-> a checkpoint directory with steps 3 and 7."""
    directory = tmp_path_factory.mktemp("pristine")
    for step in (3, 7):
        small.save(directory, step, {"step": step}, params=TREE, ema=TREE)
    return directory


@pytest.fixture
def saved(pristine, tmp_path):
    return shutil.copytree(pristine, tmp_path / "saved")


def listed(step):
    files = [file for file in step.glob("*/**/*") if file.is_file()]
    return sorted(files) + [step / SUMS]


def flip(file, rng):
    data = bytearray(file.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    file.write_bytes(data)


def cut(file, rng):
    data = file.read_bytes()
    file.write_bytes(data[: rng.integers(len(data))])


def remove(file, rng):
    file.unlink()


@pytest.mark.parametrize("place", range(50))
def test_damage_at_a_random_place_is_noticed(saved, place):
    rng = np.random.default_rng(place)
    how = (flip, cut, remove)[place % 3]
    files = listed(saved / "7")
    files = files[:-1] if how is remove else files  # of a step without sums see below
    how(files[rng.integers(len(files))], rng)
    with pytest.raises(Damaged) as error:
        load(saved, 7, params=SHAPES, ema=SHAPES)
        read_meta(saved, 7)
    said = str(error.value)
    assert f"{saved}/7 is damaged: " in said and "\n" not in said
    assert f"the step before, {saved}/3, is whole" in said


def test_what_orbax_keeps_beside_the_items_carries_nothing(saved):
    """The two files that are not listed; their loss and damage change no array."""
    beside = [file for file in (saved / "7").iterdir() if file.is_file()]
    assert sorted(file.name for file in beside) == [
        SUMS,
        "_CHECKPOINT_METADATA",
        "commit_success.txt",
    ]
    for spoil in (lambda file: file.write_bytes(b"\xff{"), lambda file: file.unlink()):
        for file in beside:
            if file.name != SUMS:
                spoil(file)
        found = load(saved, 7, params=SHAPES)["params"]
        np.testing.assert_array_equal(found["w"], TREE["w"])


@pytest.mark.parametrize("name", ["_sharding", "_METADATA", "manifest.ocdbt", None])
def test_other_items_are_no_hindrance(saved, name):
    """Orbax looks at the metadata of all items that it is told of."""
    files = [file for file in listed(saved / "7") if file.parent.parent.name == "7"]
    files = [file for file in files if file.parent.name == "params"]
    for file in files if name is None else [saved / "7/params" / name]:
        file.write_bytes(b"?")
    np.testing.assert_array_equal(load(saved, 7, ema=SHAPES)["ema"]["w"], TREE["w"])
    assert len(dict(leaves(saved, 7, "ema", SHAPES))) == 2
    assert read_meta(saved, 7) == {"step": 7}
    with pytest.raises(Damaged, match="params/"):
        load(saved, 7, params=SHAPES)


RNG = np.random.default_rng(0)


def test_coreutils_agree(saved):
    check = lambda: subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", SUMS],
        cwd=saved / "7",
        capture_output=True,
    )
    assert check().returncode == 0
    flip(listed(saved / "7")[0], RNG)
    assert check().returncode == 1


def test_every_file_of_an_item_is_listed(saved):
    assert damages(saved / "7") == []
    (saved / "7/params/stray").write_bytes(b"")
    assert damages(saved / "7") == ["params/stray has no sum"]
    (saved / "7/params/stray").rename(saved / "7/params/.DS_Store")
    assert damages(saved / "7") == []


def test_a_step_from_before_there_were_sums_loads(saved):
    (saved / "7" / SUMS).unlink()
    assert not has_sums(saved / "7") and has_sums(saved / "3")
    require_whole(saved, 7)
    np.testing.assert_array_equal(load(saved, 7, ema=SHAPES)["ema"]["w"], TREE["w"])
    flip(listed(saved / "3")[0], RNG)
    small.save(saved, 9, {"step": 9}, params=TREE)
    flip(listed(saved / "9")[0], RNG)
    with pytest.raises(
        Damaged, match="before, .*/7, has no sums to tell whether it is"
    ):
        require_whole(saved, 9)


def test_a_file_is_read_again_when_it_has_changed(saved):
    file = max(listed(saved / "7"), key=lambda file: file.stat().st_size)
    whole = file.read_bytes()
    require_whole(saved, 7)
    flip(file, RNG)
    with pytest.raises(Damaged):
        require_whole(saved, 7)
    file.write_bytes(whole)
    require_whole(saved, 7)


@pytest.fixture
def verify(monkeypatch, capsys):
    return lambda *words: small.called(main, monkeypatch, capsys, *words)


def test_verify_tells_of_each_step(saved, verify):
    (saved / "9.orbax-checkpoint-tmp-12").mkdir()
    code, out, _ = verify("verify", saved)
    assert code == 0 and [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["3", "good"],
        ["7", "good"],
        ["9", "cut"],
    ]
    remove(listed(saved / "3")[0], RNG)
    (saved / "7" / SUMS).unlink()
    code, out, _ = verify("verify", saved)
    assert code == 1 and "3  DAMAGED: ema/" in out and "7  no sums" in out
    assert verify("verify", saved / "7")[0] == 0
    assert verify("verify", saved / "3")[0] == 1


@pytest.mark.parametrize(
    "how", [("-m", "sit_jax."), ("-um", "sit_jax."), ("-msit_jax.",)]
)
def test_verify_as_a_command_says_its_name(how, tmp_path):
    *flags, package = how
    words = [sys.executable, *flags, f"{package}checkpoint", "verify", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("sit_jax.checkpoint: no checkpoint in")


def test_verify_wrongly_used(tmp_path, verify):
    for words, said in (
        (("verify", tmp_path / "none"), "no checkpoint in"),
        (("check", tmp_path), "what 'check' (one of 'verify')"),
        (("verify", tmp_path, "--config.steps=3"), "has no config"),
        (("verify",), "DIR"),
    ):
        code, _, err = verify(*words)
        assert code == 2 and said in err and err.count("\n") == 1
