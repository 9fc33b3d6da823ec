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


@pytest.mark.parametrize("name, at, last", [("look", 5, 5), ("save", 4, 5)])
def test_signal_saves_the_step_in_progress(
    tmp_path, monkeypatch, capfd, name, at, last
):
    """During a step it is the last one; during a save the next one is."""
    interrupted(monkeypatch, Keeper, name, at)
    config = small.config(save_every=4, sample_every=99)
    assert train.train(config, tmp_path) == 0
    assert checkpoint.steps(tmp_path / "checkpoints") == [4, last]
    assert list(small.losses(tmp_path)) == list(range(1, last + 1))
    out, err = capfd.readouterr()
    assert "stops after this step and saves it; Ctrl-C again" in err
    assert f"stopped at step {last}; the same command goes on" in out


def test_signal_leaves_out_a_sheet_that_the_resumed_run_draws(
    tmp_path, monkeypatch, capfd
):
    config = lambda: small.config(save_every=4, sample_every=4)
    sheet = lambda work: (work / "samples" / "0000004.png").read_bytes()
    with monkeypatch.context() as patch:
        interrupted(patch, Keeper, "look", 4)
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


def test_save_compiles_nothing(tmp_path, monkeypatch):
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
