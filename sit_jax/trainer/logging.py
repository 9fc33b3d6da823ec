"""The record of a run: console, log.txt, metrics.jsonl, PNGs, TensorBoard, wandb.

All of them see the same three events: say(message), scalars(step, values) and
image(step, name, array). What a killed run wrote after the step it resumes from is
taken back, so that every step stands in the record once.
"""

import contextlib
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from sit_jax.errors import one_line
from sit_jax.files import as_path, download, is_remote, list_files, upload
from sit_jax.sampling.pictures import save_png
from sit_jax.trainer.tracking import TensorBoard, Wandb, naming


class RunLog:
    """Writes in process 0 only; everywhere else every method does nothing.

    wandb: None, or the arguments of wandb.init as a dict, for example
    {"project": "sit"}. stream: where the console is.
    """

    def __init__(self, workdir, total_steps, first_step=0, wandb=None, stream=None):
        self._workdir = self._folder = as_path(workdir)
        self._total = total_steps
        self._sinks, self._console, self._copied = [], None, {}
        self._opened = contextlib.ExitStack()
        if jax.process_index() == 0:
            with contextlib.ExitStack() as opened:  # closed again if one of them fails
                self._open(opened, first_step, wandb, stream)
                self._opened = opened.pop_all()

    def say(self, message):
        """One line to the console and log.txt."""
        if self._console is None:
            return
        line = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {one_line(message)}"
        self._console.line(line)
        self._text.write(line)

    def progress(self, step):
        """Moves the progress bar: cheap, for every step."""
        if self._console is not None:
            self._console.progress(step)

    def scalars(self, step, values):
        """values: {name: number}. The bar and log.txt know the names "loss",
        "steps_per_second" and "images_per_second"; all others are as good elsewhere.
        """
        if self._console is None:
            return
        values = {name: _number(value) for name, value in values.items()}
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        record = {"step": step, "time": round(time.time(), 3), **finite}
        self._metrics.write(json.dumps(record, allow_nan=False))
        for sink in self._sinks:
            sink.scalars(step, values)
        self._tell(step, values)
        odd = [f"{k} is {v}" for k, v in values.items() if finite[k] is None]
        if odd:
            self.say(f"step {step}: {', '.join(odd)}; stands as null in metrics.jsonl")

    def image(self, step, name, array):
        """array: uint8 [h, w, 1 or 3]; also goes to workdir/name/step.png."""
        if self._console is None:
            return
        array = np.asarray(array)
        save_png(self._workdir / name / f"{step:07d}.png", array)
        for sink in self._sinks:
            sink.image(step, name, array)

    def lacks(self, step, name):
        """Whether the record of before has no image of that name and step."""
        return not (self._folder / name / f"{step:07d}.png").exists()

    def keep(self):
        """Before a step is saved: what is written of it is to be where the step is."""
        if self._console is not None:
            self._copy()

    def close(self):
        """Ends files and bar; safe to call twice."""
        self._console, self._sinks = None, []
        self._opened.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def _open(self, opened, first_step, wandb, stream):
        def keep(part):
            return opened.enter_context(contextlib.closing(part))

        begun = ("metrics.jsonl", "log.txt", "wandb_id.txt")
        if is_remote(self._folder):  # files of a bucket cannot be appended to
            here = tempfile.TemporaryDirectory(
                prefix="sit_jax.", ignore_cleanup_errors=True
            )
            self._workdir = Path(opened.enter_context(here))
            for name in begun:
                if (self._folder / name).exists():
                    download(self._folder / name, self._workdir / name)
            opened.callback(self._copy)
        workdir = self._workdir
        with naming(workdir):
            workdir.mkdir(parents=True, exist_ok=True)
        # the newest step that stays; a run that starts anew keeps nothing
        last = first_step if first_step > 0 else -1
        _take_back(workdir / "metrics.jsonl", last)
        self._metrics = keep(_Lines(workdir / "metrics.jsonl"))
        self._text = keep(_Lines(workdir / "log.txt"))
        if wandb is not None:
            self._sinks.append(keep(Wandb(workdir, wandb)))
        missing = []
        try:
            self._sinks.append(keep(TensorBoard(workdir / "tensorboard", last)))
        except ImportError as error:
            missing.append(f"no TensorBoard files: {error}; pip install tensorboardX")
        self._console = keep(_Console(stream or sys.stdout, self._total, first_step))
        for line in missing:
            self.say(line)

    def _copy(self):
        """Uploads the files of a run in a bucket that have changed."""
        if not is_remote(self._folder):
            return
        for name, size in list_files(self._workdir).items():
            if not name.startswith("wandb/") and self._copied.get(name) != size:
                upload(self._workdir / name, self._folder / name)
                self._copied[name] = size

    def _tell(self, step, values):
        stamp = f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] "
        line = stamp + step_line(step, values)
        self._text.write(line)
        if "loss" in values and self._console.bar is not None:
            self._console.show(step, values)
        else:
            self._console.line(line + _outlook(step, self._total, values))


def step_line(step, values):
    """The line that parsers of DiT's and SiT's log.txt know, or any other values."""
    if {"loss", "steps_per_second"} <= set(values):
        loss, speed = values["loss"], values["steps_per_second"]
        return f"(step={step:07d}) Train Loss: {loss:.4f}, Train Steps/Sec: {speed:.2f}"
    shown = ", ".join(f"{name}: {value:.4g}" for name, value in values.items())
    return f"(step={step:07d}) {shown}"


def duration(seconds):
    """3725.2 -> "1:02:05"; with days from 24 hours on."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days} d " * (days > 0) + f"{hours}:{minutes:02d}:{seconds:02d}"


class _Console:
    """A progress bar with lines above it; lines only where there is no terminal."""

    def __init__(self, stream, total, first):
        self._stream, self.bar = stream, None
        if stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(
                total=total, initial=first, unit=" steps", file=stream, mininterval=0.2
            )

    def line(self, text):
        if self.bar is not None:
            self.bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def progress(self, step):
        if self.bar is not None:
            self.bar.update(step - self.bar.n)

    def show(self, step, values):
        shown = {"loss": f"{values['loss']:.4f}"}
        if "images_per_second" in values:
            shown["images/s"] = f"{values['images_per_second']:.4g}"
        self.bar.set_postfix(shown, refresh=False)
        self.progress(step)
        self.bar.refresh()

    def close(self):
        if self.bar is not None:
            self.bar.close()


class _Lines:
    """Appends lines. Unbuffered: what is written survives a kill."""

    def __init__(self, path):
        self._path = path
        with naming(path):
            self._file = open(path, "ab", buffering=0)

    def write(self, line):
        rest = (line + "\n").encode()
        with naming(self._path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def close(self):
        self._file.close()


def _take_back(path, last):
    """Drops lines of steps after `last` and half-written ones, all at once."""
    if not path.exists():
        return
    part = path.with_name(path.name + ".part")
    with naming(path):
        with open(path, "rb") as old, open(part, "wb") as new:
            new.writelines(line for line in old if _step(line) <= last)
            new.flush()
            os.fsync(new.fileno())
        os.replace(part, path)


def _step(line):
    """The step of a line of JSON; of a torn one, after all others."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _number(value):
    return value.item() if hasattr(value, "item") else value


def _outlook(step, total, values):
    """Images per second and time to go, where they are known."""
    text = ""
    if "images_per_second" in values:
        text += f", Images/Sec: {values['images_per_second']:.4g}"
    if values.get("steps_per_second", 0) > 0:
        text += f", ETA: {duration((total - step) / values['steps_per_second'])}"
    return text
