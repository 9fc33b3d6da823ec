"""The record of a run, its continuation after a kill, and writing that fails."""

import io
import json
import math
import os
import re
import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from sit_jax.errors import UserError
from sit_jax.parallel import multihost
from sit_jax.trainer import run_log
from sit_jax.trainer.run_log import LAG, MetricsMeter, RunLog

LINE = {"loss": 0.123456, "steps_per_second": 1.234, "images_per_second": 315.9}


def run(workdir, steps, first=0, total=1000, stream=None, **settings):
    """Logs a loss at the steps given, as a training run does."""
    stream = stream or io.StringIO()
    with RunLog(workdir, total, first, stream=stream, **settings) as log:
        for step in steps:
            log.scalars(step, {"loss": 1 / step, "lr": 1e-4})
    return stream.getvalue()


def records(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in lines]


def steps_of(workdir):
    return [record["step"] for record in records(workdir)]


def events(workdir):
    """-> tensorboardX events of all files, oldest first."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # length, its checksum, event, its checksum
            size = int.from_bytes(data[:8], "little")
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_log_txt_keeps_the_line_that_parsers_know(tmp_path):
    stream = io.StringIO()
    with RunLog(tmp_path, 1000, stream=stream) as log:
        log.say("Experiment begins")
        log.scalars(100, LINE)
        log.scalars(100, {"accuracy": 0.9712345, "frechet": 12.0})
    stamp = r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] "
    said, line, other = (tmp_path / "log.txt").read_text().splitlines()
    assert re.fullmatch(stamp + "Experiment begins", said)
    wanted = r"\(step=0000100\) Train Loss: 0\.1235, Train Steps/Sec: 1\.23"
    assert re.fullmatch(stamp + wanted, line)
    wanted = r"\(step=0000100\) accuracy: 0\.9712, frechet: 12"
    assert re.fullmatch(stamp + wanted, other)
    # on the console also what the file must not have: 900 steps at 1.234 a second
    assert f"{line}, Images/Sec: 315.9, ETA: 12:09\n" in stream.getvalue()
    assert stream.getvalue().count("\n") == 3 and "\r" not in stream.getvalue()


def test_resuming_takes_back_later_steps(tmp_path):
    run(tmp_path, [10, 20, 30, 40])
    run(tmp_path, [30, 40, 50], first=20)
    assert steps_of(tmp_path) == [10, 20, 30, 40, 50]
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 7  # appended
    run(tmp_path, [5])  # anew, with no checkpoint to go on from
    assert steps_of(tmp_path) == [5]


@pytest.mark.parametrize(
    "torn", [b'{"step": 20, "lo', b'{"step": 20}', b"\0\0\n", b"7"]
)
def test_a_half_written_line_is_dropped(tmp_path, torn):
    run(tmp_path, [10])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    run(tmp_path, [30], first=25)
    assert steps_of(tmp_path) == [10, 30]


def test_taking_back_is_all_or_nothing(tmp_path, monkeypatch):
    run(tmp_path, [10, 20])
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, [], first=10)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    run(tmp_path, [15], first=10)
    assert steps_of(tmp_path) == [10, 15]


def test_metrics_are_valid_json_at_once_also_of_what_is_not_finite(tmp_path):
    values = {"loss": math.nan, "grad": -math.inf, "lr": jnp.float32(0.5), "n": 7}
    with RunLog(tmp_path, 10, stream=io.StringIO()) as log:
        log.scalars(4, values)
        (record,) = records(tmp_path)  # before closing: a kill loses no line
    assert abs(record.pop("time") - os.stat(tmp_path / "log.txt").st_mtime) < 60
    assert record == {"step": 4, "loss": None, "grad": None, "lr": 0.5, "n": 7}


def test_terminal_gets_a_bar_with_loss_and_rate(tmp_path):
    stream = Terminal()
    with RunLog(tmp_path, 1000, 40, stream=stream) as log:
        for step in range(41, 101):
            log.progress(step)
        log.scalars(100, LINE)
        log.scalars(100, {"accuracy": 0.5})
        log.say("saved")
    shown = stream.getvalue()
    last = shown.replace("\n", "\r").split("\r")
    bars = [part for part in last if "loss=0.1235" in part]
    assert bars and "100/1000" in bars[-1] and "images/s=315.9" in bars[-1]
    assert re.search(r"\d+:\d\d<\d+:\d\d.* steps/s|\d steps/s|s/ steps", bars[-1])
    assert "Train Loss" not in shown  # that is what the bar shows
    assert "accuracy: 0.5" in shown and "saved" in shown
    assert "Train Loss: 0.1235" in (tmp_path / "log.txt").read_text()


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(multihost, "is_primary", lambda: False)
    assert run(tmp_path / "new", [1, 2]) == "" and not (tmp_path / "new").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with RunLog(tmp_path, 10, stream=io.StringIO()) as log:
        with pytest.raises(UserError, match=r"log\.txt: No space left .*free space"):
            log.say("x")


@pytest.fixture
def wandb(monkeypatch):
    """A module in wandb's place that keeps what it is told."""
    fake = types.ModuleType("wandb")
    fake.runs, fake.Error = [], type("Error", (Exception,), {})
    fake.Image = lambda array: ("image", array.shape)

    class Run:
        def __init__(self, **arguments):
            self.arguments, self.logged, self.axes = arguments, [], []
            self.finished = 0

        def define_metric(self, name, step_metric=None):
            self.axes.append((name, step_metric))

        def log(self, values):
            self.logged.append(values)

        def finish(self):
            self.finished += 1

    def init(**arguments):
        fake.runs.append(Run(**arguments))
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


PNG = "samples/0000010.png"


def test_tensorboard_has_scalars_images_and_hides_repeated_steps(tmp_path):
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 1)).astype(np.uint8)
    for first in (0, 10):
        with RunLog(tmp_path, 100, first, stream=io.StringIO()) as log:
            log.scalars(first + 10, {"loss": 0.5, "lr": 2.0})
            log.image(first + 10, "samples", picture)
    found = events(tmp_path)
    starts = [event.step for event in found if event.HasField("session_log")]
    assert starts == [0, 11]  # TensorBoard hides these steps and all later ones
    values = {v.tag: v.simple_value for e in found for v in e.summary.value}
    assert values["loss"] == 0.5 and values["lr"] == 2.0
    shown = [v.image for e in found for v in e.summary.value if v.HasField("image")]
    assert len(shown) == 2 and (shown[0].height, shown[0].width) == (4, 6)
    for file in (io.BytesIO(shown[0].encoded_image_string), tmp_path / PNG):
        with Image.open(file) as image:
            grey = np.asarray(image.convert("L"))
            np.testing.assert_array_equal(grey, picture[..., 0])


def test_wandb_gets_all_events_and_the_same_id_after_a_restart(tmp_path, wandb):
    picture = np.zeros((4, 6, 1), np.uint8)
    for first in (0, 10):
        with RunLog(tmp_path, 99, first, "p", io.StringIO()) as log:
            log.scalars(first + 5, {"loss": 0.5})
            log.image(first + 5, "samples", picture)
    one, two = wandb.runs
    assert one.arguments["project"] == "p" and one.arguments["resume"] == "allow"
    assert len(one.arguments["id"]) == 16
    assert one.arguments["id"] == two.arguments["id"]
    assert ("*", "step") in one.axes
    assert one.logged == [
        {"step": 5, "loss": 0.5},
        {"step": 5, "samples": ("image", (4, 6))},
    ]
    assert (one.finished, two.finished) == (1, 1)


def test_wandb_absent_or_refusing_is_one_line(tmp_path, monkeypatch, wandb):
    def refuse(**arguments):
        raise wandb.Error("no API key configured\nrun wandb login")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="wandb: no API key configured; WANDB_MODE"):
        run(tmp_path, [], wandb="p")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        run(tmp_path, [], wandb="p")


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 100.0

    monkeypatch.setattr(run_log.time, "perf_counter", lambda: Clock.now)
    return Clock


def step(loss, **more):
    more = {"skipped": jnp.zeros(2, int), "bad": jnp.int32(-1), **more}
    return {"loss": jnp.float32(loss), **more}


def fed(counter, clock, first, losses, seconds=0.5, waited=0.1):
    arrived = []
    for i, loss in enumerate(losses):
        clock.now += seconds
        arrived += counter.add(first + i, step(loss), waited)
    return [*arrived, *counter.flush()]


def test_rates_are_of_the_steps_between_two_lines(clock):
    counter = MetricsMeter(2, images_per_step=8, flops_per_step=3e9, peak_flops=1e10)
    fed(counter, clock, 1, [1, 1], seconds=9.0)
    arrived = fed(counter, clock, 3, [1, 2], seconds=0.5, waited=0.2)
    assert [at for at, _, _ in arrived] == [3, 4]
    assert arrived[0][2] is None  # no line at every other step
    line = arrived[1][2]
    assert line["loss"] == 1.5
    assert line["steps_per_second"] == pytest.approx(2.0)
    assert line["images_per_second"] == pytest.approx(16.0)
    assert line["model_tflops"] == pytest.approx(2 * 3e9 / 1e12)
    assert line["mfu"] == pytest.approx(2 * 3e9 / 1e10)
    assert line["data_wait"] == pytest.approx(0.2)


def test_a_pause_does_not_count(clock):
    counter = MetricsMeter(2, 1, 1, None)
    clock.now += 1.0
    list(counter.add(1, step(1), 0.0))
    clock.now += 60.0
    counter.pause(60.0)
    clock.now += 1.0
    list(counter.add(2, step(1), 0.0))
    line = list(counter.flush())[-1][2]
    assert line["steps_per_second"] == pytest.approx(1.0)
    assert "mfu" not in line  # the chip's peak is not known


def test_a_step_is_looked_at_only_when_later_ones_are_under_way(clock):
    counter, arrived = MetricsMeter(1, 1, 1, None), []
    for at in range(1, 6):
        arrived.append([step for step, _, _ in counter.add(at, step(0), 0.0)])
    assert arrived == [[]] * LAG + [[i] for i in range(1, 6 - LAG)]
    assert [at for at, _, _ in counter.flush()] == [4, 5]
    assert not list(counter.flush())


def test_a_skipped_step_does_not_hide_the_loss_of_the_others(clock):
    line = fed(MetricsMeter(3, 1, 1, None), clock, 1, [1, math.nan, 3])[-1][2]
    assert line["loss"] == 2
    line = fed(MetricsMeter(1, 1, 1, None), clock, 1, [math.inf])[0][2]
    assert "loss" not in line  # nothing to say
