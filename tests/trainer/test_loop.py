"""train.py: what a run leaves behind, what it refuses, how it stops and resumes."""

import dataclasses
import json
import os
import shutil
import signal
import socket

import jax
import numpy as np
import pytest
from helpers import commands, small
from helpers.small import FILE

from sit_jax import checkpoint
from sit_jax.cli.main import StopSignal
from sit_jax.data import sources
from sit_jax.errors import UserError
from sit_jax.trainer import loop
from sit_jax.trainer.loop import train
from sit_jax.trainer.resume import CheckpointWriter

run = small.train_run


def test_a_run_leaves_everything_behind(run, tmp_path):
    work = tmp_path / "a run"
    code, out, _ = run("--config", FILE, "--workdir", work, "--config.sample_every=4")
    assert code == 0
    assert "compiled the training step in" in out and "(step=0000008)" in out
    assert "EMA decay 0.9999" in out
    records = small.lines(work)
    assert [record["step"] for record in records] == list(range(1, 9))
    last = records[-1]
    for name in ("loss", "grad_norm", "steps_per_second", "images_per_second"):
        assert last[name] > 0
    assert last["data_wait"] >= 0 and last["peak_memory_gb"] > 0 and not last["skipped"]
    assert checkpoint.steps(work / "checkpoints") == [4, 8]
    sheets = sorted(path.name for path in (work / "samples").iterdir())
    assert sheets == ["0000004.png", "0000008.png"]
    assert list((work / "tensorboard").iterdir()) and (work / "log.txt").exists()
    manifest = json.loads((work / "manifest.json").read_text())
    assert manifest["packages"]["jax"] == jax.__version__
    assert manifest["config"]["batch_size"] == 8


def test_a_run_connects_to_nothing(run, tmp_path, monkeypatch):
    def refused(self, address):
        raise AssertionError(f"connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refused)
    assert run("--config", FILE, "--workdir", tmp_path, "--config.steps=1")[0] == 0


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of one step."""
    workdir = tmp_path_factory.mktemp("done")
    train(small.config(steps=1, preview=0), workdir)
    return workdir


ONE = ("--config", FILE, "--config.steps=1", "--config.preview=0")


def test_the_same_command_again_has_nothing_to_do(run, done):
    before = (done / "metrics.jsonl").read_text()
    code, out, _ = run(*ONE, "--workdir", done)
    assert code == 0 and "nothing to do" in out
    assert (done / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--workdir {done} --config.optimizer.b2=0.9", "b2 was 0.999, is 0.9)"),
        (
            "--workdir {done}/checkpoints",
            "it with --init {done}/checkpoints",
        ),
        ("--workdir {new} --init {done}", "is at step 1 and config.steps is 1"),
        (
            "--workdir {new} --init {done} --config.model.width=32",
            "architecture: ",
        ),
    ],
)
def test_what_does_not_fit_another_run_is_refused(
    run, done, tmp_path, arguments, message
):
    folders = {"done": done, "new": tmp_path / "new"}
    before = {path: path.stat() for path in done.rglob("*")}
    code, _, err = run(*ONE, *arguments.format(**folders).split())
    assert code == 2 and message.format(**folders) in err and err.count("\n") == 1
    assert not (tmp_path / "new").exists()
    assert before.keys() == set(done.rglob("*"))


@pytest.mark.slow
def test_init_takes_weights_optimizer_and_step(run, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("--config", FILE, "--workdir", first)[0] == 0
    longer = ("--config", FILE, "--config.steps=10")
    code, out, _ = run(*longer, "--workdir", second, "--init", first)
    assert code == 0 and "goes on from" in out
    assert run(*longer, "--workdir", first)[0] == 0
    assert small.losses(second) == {
        step: loss for step, loss in small.losses(first).items() if step > 8
    }


BAD = {
    "no such file": (["--config", "nowhere.py"], "no config file at nowhere.py"),
    "misspelt": (["--config.model.dpeth=2"], "did you mean 'depth'?"),
    "unknown flag": (["--batch=3"], "--batch=3"),
    "not divisible": (["--config.batch_size=9"], "9 is not divisible by 8"),
    "patch": (["--config.model.patch=3"], "side 4 is not divisible by patch 3"),
    "mesh": (["--config.mesh.fsdp=3"], "does not make up 8 devices"),
    "no data": (["--config.synthetic=False"], "no folder"),
    "other data": (
        [
            "--config.synthetic=False",
            "--config.source.path={data}",
            "--config.source.classes=5",
        ],
        "the data is (2, 2, 1), but config.shape is (4, 4, 1)",
    ),
    "seed": (["--config.seed=-1"], "seed is -1; it takes a whole number from 0"),
    "clip": (["--config.clip=-1.0"], "clip is -1.0"),
    "bucket": (["--workdir", "s3://bucket/run"], "s3://bucket/run: only paths"),
    "no checkpoint": (["--init", "nowhere"], "no weights at nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(run, tmp_path, name):
    arguments, said = BAD[name]
    for kind, array in (("features", np.ones((1, 1, 2, 2), np.float32)), ("labels", 3)):
        folder = tmp_path / "data" / f"imagenet256_{kind}"
        folder.mkdir(parents=True)
        np.save(folder / "0.npy", np.atleast_1d(array))
    arguments = [word.format(data=tmp_path / "data") for word in arguments]
    config = [] if "--config" in arguments else ["--config", FILE]
    code, _, err = run(*config, "--workdir", tmp_path / "work", *arguments)
    assert code == 2
    assert said in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "work").exists()  # so that the mended command may have it


def test_a_disk_without_room_for_a_step_is_refused_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=9))
    with pytest.raises(UserError, match="free, .*checkpoints/a step needs"):
        train(small.config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_skips_what_is_not_finite_then_stops(run, tmp_path, monkeypatch):
    """From record 40 on every latent is broken: five good steps of eight, then none."""

    @dataclasses.dataclass(frozen=True)
    class Broken(sources.Synthetic):
        length: int = 8

        def __getitem__(self, i):
            record = super().__getitem__(i)
            return {**record, "latent": record["latent"] * np.nan}

    code, _, _ = run("--config", FILE, "--workdir", tmp_path, "--config.steps=4")
    assert code == 0
    monkeypatch.setattr(loop, "Synthetic", Broken)
    code, out, err = run(
        "--config", FILE, "--workdir", tmp_path, "--config.max_skipped=3"
    )
    assert code == 2 and err.count("\n") == 1
    assert "step 5 skipped: the batch is not finite" in out
    assert "3 steps in a row were not finite, first in the batch, at step 7" in err
    assert f"last good checkpoint: step 4 in {tmp_path}" in err
    assert checkpoint.steps(tmp_path / "checkpoints") == [4]


def interrupted(monkeypatch, owner, name, at):
    """Ctrl-C when something is called for a step."""
    call = getattr(owner, name)

    def calling(*words):
        if at in words:
            os.kill(os.getpid(), signal.SIGINT)
        return call(*words)

    monkeypatch.setattr(owner, name, calling)


FIELDS = {"steps": 40, "save_every": 7, "sample_every": 99}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The losses of a run that nothing befalls."""
    workdir = tmp_path_factory.mktemp("unbroken")
    train(small.config(**FIELDS, preview=0), workdir)
    losses = small.losses(workdir)
    assert len(losses) == FIELDS["steps"] == len(set(losses.values()))
    return losses


@pytest.mark.parametrize("name, at, last", [("check", 5, 5), ("save", 7, 8)])
def test_signal_saves_the_step_in_progress_and_the_run_goes_on(
    unbroken, tmp_path, monkeypatch, capfd, name, at, last
):
    """During a step it is the last one; during a save the next one is."""
    config = lambda: small.config(**FIELDS, preview=0)
    with monkeypatch.context() as patch:
        interrupted(patch, CheckpointWriter, name, at)
        train(config(), tmp_path, stop=StopSignal())
    assert checkpoint.steps(tmp_path / "checkpoints")[-1] == last
    assert list(small.losses(tmp_path)) == list(range(1, last + 1))
    out, err = capfd.readouterr()
    assert "stops after this step and saves it; Ctrl-C again" in err
    assert f"stopped at step {last}; the same command goes on" in out
    train(config(), tmp_path)
    assert small.losses(tmp_path) == unbroken


def test_stop_draws_no_sheet(tmp_path, monkeypatch, capsys):
    interrupted(monkeypatch, CheckpointWriter, "check", 2)
    train(small.config(sample_every=2), tmp_path, stop=StopSignal())
    assert "no samples of step 2 were drawn; sample.py" in capsys.readouterr().out
    assert not (tmp_path / "samples").exists()


def test_save_compiles_nothing(tmp_path, monkeypatch):
    """With copies to be compared: what is compiled after Ctrl-C is waited for."""
    built, saving = [], []
    save = CheckpointWriter.save

    def listened(self, step, state):
        saving.append(step)
        try:
            return save(self, step, state)
        finally:
            saving.clear()

    def hear(event, seconds, **more):
        if saving and event.startswith("/jax/core/compile"):
            built.append(event)

    monkeypatch.setattr(CheckpointWriter, "save", listened)
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        config = small.config(steps=2, save_every=1, preview=0)
        config.mesh.fsdp = 1
        config.check_replicas = 1000
        train(config, tmp_path)
    finally:
        jax.monitoring.unregister_event_duration_listener(hear)
    assert checkpoint.steps(tmp_path / "checkpoints") == [1, 2] and not built


# ---- killed processes, with make test-slow ----


def finish(workdir):
    commands.ended(commands.start(workdir, **FIELDS, devices=8))
    return small.losses(workdir)


MOMENTS = {
    "before any checkpoint": lambda workdir: commands.logged(workdir, 3),
    "between checkpoints": lambda workdir: commands.logged(workdir, 24),
    "inside a save": lambda workdir: commands.saving(workdir, 21),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_losses_of_a_killed_run_are_those_of_an_unbroken_one(
    unbroken, tmp_path, moment
):
    process = commands.start(tmp_path, **FIELDS, devices=8)
    commands.until(process, lambda: MOMENTS[moment](tmp_path))
    commands.kill(process)
    assert len(small.losses(tmp_path)) < FIELDS["steps"]
    assert finish(tmp_path) == unbroken
    assert not list((tmp_path / "checkpoints").glob("*tmp*"))


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(unbroken, tmp_path):
    process = commands.start(tmp_path, **FIELDS, devices=8)
    commands.until(process, lambda: commands.logged(tmp_path, 10))
    process.send_signal(signal.SIGTERM)
    commands.ended(process)
    assert "stopped at step" in (tmp_path / "log.txt").read_text()
    assert finish(tmp_path) == unbroken
