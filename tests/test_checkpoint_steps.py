"""Steps of a checkpoint directory: kept, cleaned away, found, refused."""

import os
import shutil
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import small
from checkpoints import META, equal, mesh, saved, trees

from sit_jax.checkpoint import Checkpoints, find, load, read_meta, steps
from sit_jax.errors import UserError

one_step = checkpoints.one_step


def test_steps_that_are_kept(tmp_path):
    state, _ = trees(mesh(1))
    small = {"params": {"b": state["params"]["b"]}}
    saved(tmp_path, small, *range(1, 9), keep_last=2, keep_every=3)
    assert steps(tmp_path) == [3, 6, 7, 8]


def test_the_newest_is_the_highest_number_whatever_size_or_date(tmp_path):
    rng = np.random.default_rng(0)
    for number, size in ((9, 50), (100, 2), (20, 3000)):
        tree = {"w": rng.standard_normal(size).astype(np.float32)}
        saved(tmp_path, {"params": tree}, number, keep_last=None)
    now = (tmp_path / "9").stat().st_mtime
    os.utime(tmp_path / "9", (now + 99, now + 99))
    assert steps(tmp_path) == [9, 20, 100]
    assert find(tmp_path) == (tmp_path, 100)
    saver = Checkpoints(tmp_path)
    assert saver.latest() == 100
    saver.close()


def test_an_unfinished_step_is_no_step_and_is_cleaned_away(one_step, tmp_path):
    """What a kill inside a save leaves: Orbax's folder under a temporary name."""
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    torn = tmp_path / "8.orbax-checkpoint-tmp-1234"
    (torn / "params.orbax-checkpoint-tmp-1234").mkdir(parents=True)
    assert steps(tmp_path) == [7] and find(tmp_path)[1] == 7
    saver = Checkpoints(tmp_path)
    assert saver.latest() == 7
    state, like = trees(mesh(1), seed=1)
    saver.save(8, META, **state)
    saver.close()
    assert not torn.exists()
    assert equal(load(tmp_path, 8, **like), state)


def test_a_workdir_or_its_checkpoints_are_found(one_step, tmp_path):
    shutil.copytree(one_step, tmp_path / "checkpoints")
    (tmp_path / "samples").mkdir()
    for path in (tmp_path, tmp_path / "checkpoints", str(tmp_path)):
        assert find(path) == (tmp_path / "checkpoints", 7)


def test_relative_paths_and_the_home_folder(tmp_path, monkeypatch):
    state, like = trees(mesh(1))
    small = {"params": {"b": state["params"]["b"]}}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for path in ("here/run", Path("~/run")):
        saved(path, small, 1)
        directory, step = find(path)
        assert directory.is_absolute() and step == 1 and steps(path) == [1]
        found = load(directory, step, params={"b": like["params"]["b"]})
        assert equal(found, small)
    assert (tmp_path / "here/run/1").is_dir() and (tmp_path / "home/run/1").is_dir()


def test_nothing_to_find_is_said(one_step, tmp_path):
    assert steps(tmp_path / "none") == steps(tmp_path) == []
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="no checkpoint in"):
            find(path)
    with pytest.raises(UserError, match="no checkpoint of step 8"):
        read_meta(one_step, 8)


def test_a_file_in_the_folder_s_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "deeper"):
        with pytest.raises(UserError, match="file.*: Not a directory"):
            saved(path, {"params": {"w": np.zeros(3)}}, 1)


def test_a_folder_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with small.unprivileged(), pytest.raises(UserError, match="Permission denied"):
        Checkpoints(tmp_path / "run")


def test_a_damaged_step_is_refused(one_step, tmp_path):
    shutil.copytree(one_step, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "7" / "ema")
    (tmp_path / "7" / "ema").mkdir()
    _, like = trees(mesh(1))
    with pytest.raises(UserError, match="7"):
        load(tmp_path, 7, ema=like["ema"])
