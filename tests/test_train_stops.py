"""train.py is stopped by a signal: the step is saved, and nothing is left out."""

import os
import signal

import jax
import pytest
import small

import train
from sit_jax import checkpoint
from sit_jax.trainer.keeper import Keeper


def interrupted(monkeypatch, owner, name, at):
    """Ctrl-C when something is called for a step."""
    call = getattr(owner, name)

    def calling(*words):
        if at in words:
            os.kill(os.getpid(), signal.SIGINT)
        return call(*words)

    monkeypatch.setattr(owner, name, calling)


@pytest.mark.parametrize("name, at", [("save", 4), ("look", 5)])
def test_a_signal_finds_the_step_saved(tmp_path, monkeypatch, capfd, name, at):
    """Once: a step that is being saved is the last one, and no sheet is begun."""
    interrupted(monkeypatch, Keeper, name, at)
    config = small.config(save_every=4, sample_every=4 if at == 4 else 99)
    assert train.train(config, tmp_path) == 0
    assert checkpoint.steps(tmp_path / "checkpoints") == sorted({4, at})
    assert list(small.losses(tmp_path)) == list(range(1, at + 1))
    out, err = capfd.readouterr()
    assert "ends when this step is saved (" in err and "Ctrl-C again" in err
    assert f"stopped at step {at}" in out
    assert ("no samples of step 4 were drawn" in out) == (at == 4)


def test_a_sheet_that_a_stop_left_out_is_drawn_when_the_run_goes_on(
    tmp_path, monkeypatch, capfd
):
    config = lambda: small.config(save_every=4, sample_every=4)
    sheet = lambda work: (work / "samples" / "0000004.png").read_bytes()
    with monkeypatch.context() as patch:
        interrupted(patch, Keeper, "save", 4)
        assert train.train(config(), tmp_path / "broken") == 0
    assert "step 4 were drawn; a run that goes on does" in capfd.readouterr().out
    assert not (tmp_path / "broken" / "samples").exists()
    for work in ("broken", "unbroken"):
        assert train.train(config(), tmp_path / work) == 0
    assert sheet(tmp_path / "broken") == sheet(tmp_path / "unbroken")
    said = capfd.readouterr().out
    assert said.count("drew the samples of step 4") == 2
    config = lambda: small.config(save_every=4, sample_every=8, steps=9)
    assert train.train(config(), tmp_path / "broken") == 0
    assert "drew the samples of step 8" not in capfd.readouterr().out  # it has one


def test_a_save_compiles_nothing(tmp_path, monkeypatch):
    """With copies to be compared: what is compiled after Ctrl-C is waited for."""
    built, saving = [], []
    save = Keeper.save

    def listened(self, step, state):
        saving.append(step)
        try:
            return save(self, step, state)
        finally:
            saving.clear()

    def hear(event, seconds, **more):
        if saving and event.startswith("/jax/core/compile"):
            built.append(event)

    monkeypatch.setattr(Keeper, "save", listened)
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        config = small.config(steps=2, save_every=1, preview=0)
        config.mesh.fsdp = 1
        config.check_replicas = 1000
        assert train.train(config, tmp_path) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2] and not built


def test_a_signal_during_a_picture_finds_its_step_saved(tmp_path, monkeypatch):
    """Of a step that has no save of its own, the next one is taken and saved."""

    def look(self, at, average, ends):
        if at == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return 0.0

    monkeypatch.setattr(train.Views, "__call__", look)
    assert train.train(small.config(save_every=99), tmp_path) == 0
    assert checkpoint.steps(tmp_path / "checkpoints") == [4]
    assert list(small.losses(tmp_path)) == [1, 2, 3, 4]
