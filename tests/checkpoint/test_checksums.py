"""What happens to a checkpoint's files is noticed before they are used."""

import shutil
import subprocess

import jax
import numpy as np
import pytest
from helpers import small

from sit_jax.checkpoint import (
    DamagedCheckpoint,
    iter_leaves,
    load,
    read_meta,
    require_intact,
    restore_newest,
    steps,
)
from sit_jax.checkpoint.__main__ import main
from sit_jax.checkpoint.checksums import FILE_NAME, damages

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
    return sorted(files) + [step / FILE_NAME]


def flip(file, rng):
    data = bytearray(file.read_bytes())
    data[rng.integers(len(data))] ^= 1 << rng.integers(8)
    file.write_bytes(data)


def cut(file, rng):
    data = file.read_bytes()
    file.write_bytes(data[: rng.integers(len(data))])


def remove(file, rng):
    file.unlink()


@pytest.mark.parametrize("place", range(12))
def test_load_refuses_damage_at_a_random_place(saved, place):
    rng = np.random.default_rng(place)
    how = (flip, cut, remove)[place % 3]
    files = listed(saved / "7")
    files = files[:-1] if how is remove else files  # of a step without sums see below
    how(files[rng.integers(len(files))], rng)
    with pytest.raises(DamagedCheckpoint) as error:
        load(saved, 7, params=SHAPES, ema=SHAPES)
        read_meta(saved, 7)
    message = str(error.value)
    assert message.startswith(f"{saved}/7 is damaged: ") and "\n" not in message
    assert f"sit_jax.checkpoint verify {saved} tells which are whole" in message


@pytest.mark.parametrize("name", ["_METADATA", None])
def test_load_ignores_damage_in_other_items(saved, name):
    """Orbax looks at the metadata of all items that it is told of."""
    files = [file for file in listed(saved / "7") if file.parent.parent.name == "7"]
    files = [file for file in files if file.parent.name == "params"]
    for file in files if name is None else [saved / "7/params" / name]:
        file.write_bytes(b"?")
    np.testing.assert_array_equal(load(saved, 7, ema=SHAPES)["ema"]["w"], TREE["w"])
    assert len(dict(iter_leaves(saved, 7, "ema", SHAPES))) == 2
    assert read_meta(saved, 7) == {"step": 7}
    with pytest.raises(DamagedCheckpoint, match="params/"):
        load(saved, 7, params=SHAPES)


RNG = np.random.default_rng(0)


def test_checksums_are_those_of_coreutils(saved):
    check = lambda: subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", FILE_NAME],
        cwd=saved / "7",
        capture_output=True,
    )
    assert check().returncode == 0
    flip(listed(saved / "7")[0], RNG)
    assert check().returncode == 1


def test_damages_lists_files_that_were_added(saved):
    assert damages(saved / "7") == []
    (saved / "7/params/stray").write_bytes(b"")
    assert damages(saved / "7") == ["params/stray has no checksum"]
    (saved / "7/params/stray").rename(saved / "7/params/.DS_Store")
    assert damages(saved / "7") == []


def test_require_intact_reads_a_changed_file_again(saved):
    file = max(listed(saved / "7"), key=lambda file: file.stat().st_size)
    whole = file.read_bytes()
    require_intact(saved, 7)
    flip(file, RNG)
    with pytest.raises(DamagedCheckpoint):
        require_intact(saved, 7)
    file.write_bytes(whole)
    require_intact(saved, 7)


@pytest.mark.parametrize("has_sums", [True, False])
def test_restore_newest_passes_over_a_half_copied_step(saved, has_sums):
    shutil.rmtree(saved / "7" / "ema")
    if not has_sums:
        (saved / "7" / FILE_NAME).unlink()
    restored, lines = restore_newest(saved, lambda step: f"state of {step}")
    assert restored == "state of 3" and steps(saved) == [3]
    assert lines[0] == "goes on from step 3"
    assert "WARNING: step 7 is damaged" in lines[1] and "7.damaged" in lines[1]
    assert (saved / "7.damaged").is_dir()


def test_step_of_a_run_without_checksums_is_taken(saved):
    for step in (3, 7):
        (saved / str(step) / FILE_NAME).unlink()
    restored, lines = restore_newest(saved, lambda step: step)
    assert restored == 7 and "no checksums" in lines[1]
    require_intact(saved, 7)
    np.testing.assert_array_equal(load(saved, 7, ema=SHAPES)["ema"]["w"], TREE["w"])


def test_restore_newest_refuses_a_run_with_no_whole_step(saved):
    for step in (3, 7):
        flip(listed(saved / str(step))[0], RNG)
    with pytest.raises(DamagedCheckpoint, match="/7 is damaged"):
        restore_newest(saved, lambda step: step)
    assert steps(saved) == [3, 7]


@pytest.fixture
def verify(monkeypatch, capsys):
    return lambda *words: small.called(main, monkeypatch, capsys, *words)


def test_verify_prints_a_line_for_each_step(saved, verify):
    code, out, _ = verify("verify", saved)
    assert code == 0 and [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["3", "good"],
        ["7", "good"],
    ]
    remove(listed(saved / "3")[0], RNG)
    (saved / "7" / FILE_NAME).unlink()
    code, out, _ = verify("verify", saved)
    assert code == 1 and "3  DAMAGED: ema/" in out and "7  has no checksums" in out
    assert verify("verify", saved / "7")[0] == 0
    assert verify("verify", saved / "3")[0] == 1


def test_verify_answers_mistakes_in_one_line(tmp_path, verify):
    for words, said in (
        (("verify", tmp_path / "none"), "no checkpoint in"),
        (("check", tmp_path), "what 'check' (one of 'verify')"),
        (("verify", tmp_path, "--config.steps=3"), "--config.steps=3"),
        (("verify",), "DIR"),
    ):
        code, _, err = verify(*words)
        assert code == 2 and said in err and err.count("\n") == 1
