"""A run's folder keeps its config, and two runs apart."""

import errno
import json
import os

import pytest

from sit_jax.errors import UserError
from sit_jax.files import lock, read_json
from sit_jax.trainer.workdir import check_workdir, locked_workdir, open_workdir

CONFIG = {
    "steps": 10,
    "seed": 0,
    "model": {"make": {"name": "sit_jax.models.dit.SiT"}, "depth": 2, "remat": "none"},
    "sampler": {"make": {"name": "Ode"}, "steps": 4},
    "mesh": {"data": 1, "fsdp": -1},
}


def but(**changes):
    config = json.loads(json.dumps(CONFIG))
    for name, value in changes.items():
        *groups, last = name.split("__")
        node = config
        for group in groups:
            node = node[group]
        node[last] = value
    return config


def test_a_new_folder_is_made_with_its_config(tmp_path):
    open_workdir(path := tmp_path / "a" / "b", CONFIG)
    assert read_json(path / "config.json") == CONFIG
    assert os.listdir(path) == ["config.json"]


def tree(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files}, list(folder.rglob("*"))


def test_a_run_is_alone_before_it_looks(tmp_path):
    """Or the second of two stumbles over what the first is replacing."""
    with lock(tmp_path):
        (tmp_path / "config.json").write_text("half of it")
        with (
            pytest.raises(UserError, match="is in use by"),
            locked_workdir(tmp_path, CONFIG),
        ):
            raise AssertionError


def test_what_is_refused_leaves_nothing(tmp_path):
    open_workdir(run := tmp_path / "run", CONFIG)
    before = tree(tmp_path)
    with (
        pytest.raises(UserError, match="another config"),
        locked_workdir(run, but(seed=1)),
    ):
        raise AssertionError
    new = tmp_path / "a" / "b"
    with (
        pytest.raises(UserError, match="no such weights"),
        locked_workdir(new, CONFIG) as place,
    ):
        assert place == new and (new / ".lock").exists()
        raise UserError("no such weights")
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=f"{tmp_path}: No space left.*--workdir"):
        open_workdir(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1, "model__depth": 3}, "model.depth was 2, is 3; seed was 0, is 1"),
        ({"model__make": {"name": "DiT"}}, "model.make was"),
        ({"extra": 1}, "extra was (absent), is 1"),
        ({"steps_ahead": 3}, "steps_ahead was"),  # no free field, if one begins so
    ],
)
def test_another_config_is_refused_with_its_fields(tmp_path, changes, message):
    open_workdir(tmp_path, CONFIG)
    with pytest.raises(UserError) as error:
        check_workdir(tmp_path, but(steps=99, **changes))
    assert message in str(error.value) and str(tmp_path) in str(error.value)
    assert "steps was" not in str(error.value)  # that one may change


CURVE = {"evaluate_every": 5, "evaluate_images": 9, "reference": "x.npz"}


@pytest.mark.parametrize(
    "changes",
    [
        dict(steps=20, model__remat="full", mesh__fsdp=1, sampler={"make": "Sde"}),
        dict(CURVE, features=None, vae="ema", preview=4, model__unroll=1),
    ],
)
def test_what_does_not_enter_a_step_may_change(tmp_path, changes):
    open_workdir(tmp_path, CONFIG)
    assert check_workdir(tmp_path, but(**changes)) == tmp_path


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe\x00"])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        check_workdir(tmp_path, CONFIG)


def test_a_file_in_the_folder_s_place_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="run is a file"):
        check_workdir(tmp_path / "run", CONFIG)
    with pytest.raises(UserError, match="run"):
        open_workdir(tmp_path / "run" / "deeper", CONFIG)
