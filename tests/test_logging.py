"""The record of a run, its continuation after a kill, and writing that fails."""

import io
import os
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from logs import LINE, records, run, steps_of

from sit_jax.errors import UserError
from sit_jax.trainer.logging import RunLog, duration


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
    assert f"{line}, Images/Sec: 315.9, ETA: 0:12:09\n" in stream.getvalue()
    assert stream.getvalue().count("\n") == 3 and "\r" not in stream.getvalue()


def test_metrics_are_one_json_object_a_line_at_once(tmp_path):
    with RunLog(tmp_path, 10, stream=io.StringIO()) as log:
        log.scalars(3, {"loss": jax.numpy.float32(0.5), "n": np.int64(7), "x": 2})
        (record,) = records(tmp_path)  # before closing: a kill loses no line
    assert abs(record.pop("time") - os.stat(tmp_path / "log.txt").st_mtime) < 60
    assert record == {"step": 3, "loss": 0.5, "n": 7, "x": 2}


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


def test_numbers_that_are_not_finite_stay_valid_json_and_are_told(tmp_path):
    with RunLog(tmp_path, 10, stream=io.StringIO()) as log:
        log.scalars(4, {"loss": float("nan"), "grad": float("-inf"), "lr": 0.5})
    (record,) = records(tmp_path)
    assert (record["loss"], record["grad"], record["lr"]) == (None, None, 0.5)
    told = (tmp_path / "log.txt").read_text()
    assert "step 4: loss is nan, grad is -inf; stands as null" in told


def test_images_are_files_too(tmp_path):
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    with RunLog(tmp_path, 100, stream=io.StringIO()) as log:
        log.image(20, "samples", jax.numpy.asarray(picture))
    with Image.open(tmp_path / "samples" / "0000020.png") as image:
        np.testing.assert_array_equal(np.asarray(image), picture)


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
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with RunLog(tmp_path / "new", 10, stream=sys.stdout) as log:
        log.say("x")
        log.progress(1)
        log.scalars(1, LINE)
        log.image(1, "samples", np.zeros((2, 2, 1), np.uint8))
    assert not (tmp_path / "new").exists()


def test_closing_twice_and_using_it_later_is_harmless(tmp_path):
    log = RunLog(tmp_path, 10, stream=Terminal())
    log.scalars(1, LINE)
    log.close()
    log.close()
    log.scalars(2, LINE)
    log.say("late")
    assert steps_of(tmp_path) == [1]


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/run: .*--workdir"):
        run(tmp_path / "file" / "run", [])


def test_a_workdir_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    refused = pytest.raises(UserError, match="cannot write .*: Permission denied")
    with small.unprivileged(), refused:
        run(tmp_path, [])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux only")
def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    with RunLog(tmp_path, 10, stream=io.StringIO()) as log:
        with pytest.raises(UserError, match=r"log\.txt: No space left .*free space"):
            log.say("x")


def test_lines_are_written_whole(tmp_path, monkeypatch):
    class Slow(io.RawIOBase):
        def __init__(self):
            self.data = b""

        def write(self, data):
            self.data += bytes(data[:3])
            return min(3, len(data))

    log = RunLog(tmp_path, 10, stream=io.StringIO())
    with log:
        real, log._text._file = log._text._file, Slow()
        log.say("ten letters")
        assert log._text._file.data.endswith(b"ten letters\n")
        real.close()


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00:00"), (59.9, "0:00:59"), (3725.2, "1:02:05"), (180000, "2 d 2:00:00")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
