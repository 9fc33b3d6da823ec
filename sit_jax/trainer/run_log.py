"""Writes the record of a run: console, log.txt, metrics.jsonl, PNGs and services.

What a killed run wrote after the step it resumes from is taken back, so that every step
stands in the record once. Files of a run in a bucket are written on this machine and
uploaded whole at each save and at the end.
"""

import collections
import contextlib
import dataclasses
import json
import math
import secrets
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeAlias

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from sit_jax.errors import UserError, one_line
from sit_jax.files import (
    PathLike,
    as_path,
    atomic_write,
    download,
    is_remote,
    list_files,
    upload,
)
from sit_jax.parallel import multihost
from sit_jax.sampling.grid import save_png

CONTINUED = ("metrics.jsonl", "log.txt", "wandb_id.txt")  # by a run that resumes
LAG = 2  # steps whose metrics may still be on their way, so that logging never blocks

Image = UInt8[np.ndarray, "h w c"]
# step, its metrics, and a line of means and rates since the last one or None
ArrivedStep: TypeAlias = tuple[int, dict[str, Any], dict[str, float] | None]


class RunLog:
    """Writes in process 0 only; everywhere else every method does nothing.

    Args:
        workdir: The run's folder.
        total_steps: Steps at which the run ends, for the progress bar.
        first_step: The step that the run resumes from.
        wandb: A project of Weights & Biases; None is without.
        stream: Where the console is.
    """

    def __init__(
        self,
        workdir: PathLike,
        total_steps: int,
        first_step: int = 0,
        wandb: str | None = None,
        stream: TextIO | None = None,
    ):
        self._workdir, self._total = as_path(workdir), total_steps
        self._stream = stream or sys.stdout
        self._uploaded: dict[str, int] = {}
        self._is_primary = multihost.is_primary()
        with contextlib.ExitStack() as stack:  # closed again if something fails
            if self._is_primary:
                self._open(stack, first_step, wandb)
            self._resources = stack.pop_all()

    def _open(
        self, stack: contextlib.ExitStack, first_step: int, wandb: str | None
    ) -> None:
        self._folder = self._workdir
        if is_remote(self._workdir):  # files of a bucket cannot be appended to
            temporary = tempfile.TemporaryDirectory(
                prefix="sit_jax.", ignore_cleanup_errors=True
            )
            self._folder = Path(stack.enter_context(temporary))
            for name in CONTINUED:
                if (self._workdir / name).exists():
                    download(self._workdir / name, self._folder / name)
            stack.callback(self.flush)
        self._folder.mkdir(parents=True, exist_ok=True)
        last_step = first_step if first_step > 0 else -1  # the newest one that stays
        _drop_later_steps(self._folder / "metrics.jsonl", last_step)
        open_file = lambda name: stack.enter_context(
            open(self._folder / name, "ab", buffering=0)  # a kill loses no line
        )
        self._metrics, self._text = map(open_file, ("metrics.jsonl", "log.txt"))
        self._sinks: list[TensorBoard | Wandb] = [
            TensorBoard(self._folder / "tensorboard", last_step)
        ]
        stack.callback(self._sinks[0].close)
        if wandb is not None:
            self._sinks.append(Wandb(self._folder, wandb))
            stack.callback(self._sinks[1].close)
        self._bar = stack.enter_context(
            tqdm(
                total=self._total,
                initial=first_step,
                unit=" steps",
                file=self._stream,
                mininterval=0.2,
                disable=not self._stream.isatty(),
            )
        )

    def say(self, message: str) -> None:
        """Writes one line to the console and log.txt."""
        if self._is_primary:
            line = _stamped(one_line(message))
            self._print(line)
            _write(self._text, line)

    def progress(self, step: int) -> None:
        """Moves the progress bar: cheap, for every step."""
        if self._is_primary:
            self._bar.update(step - self._bar.n)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Records numbers by name; "loss" and "steps_per_second" make DiT's line."""
        if not self._is_primary:
            return
        values = {name: np.asarray(value).item() for name, value in values.items()}
        finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
        record = {"step": step, "time": round(time.time(), 3), **finite}
        _write(self._metrics, json.dumps(record, allow_nan=False))
        for sink in self._sinks:
            sink.scalars(step, values)
        line = _stamped(step_line(step, values))
        _write(self._text, line)
        if "loss" in values and not self._bar.disable:
            rate = values.get("images_per_second", math.nan)
            shown = {"loss": f"{values['loss']:.4f}", "images/s": f"{rate:.4g}"}
            self._bar.set_postfix(shown)
        else:
            self._print(line + _rates(step, self._total, values))

    def image(self, step: int, name: str, array: Image) -> None:
        """Records a picture with 1 or 3 channels; it is also workdir/name/step.png."""
        if self._is_primary:
            save_png(self._folder / name / f"{step:07d}.png", np.asarray(array))
            for sink in self._sinks:
                sink.image(step, name, np.asarray(array))

    def flush(self) -> None:
        """Uploads a bucket's record, before a step is saved there."""
        if not (self._is_primary and is_remote(self._workdir)):
            return
        for name, size in list_files(self._folder).items():
            if not name.startswith("wandb/") and self._uploaded.get(name) != size:
                upload(self._folder / name, self._workdir / name)
                self._uploaded[name] = size

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        self._resources.close()

    def _print(self, line: str) -> None:
        self._bar.write(line, file=self._stream)
        self._stream.flush()


def step_line(step: int, values: Mapping[str, float]) -> str:
    """Returns a line, with a loss and a rate that of DiT's and SiT's log.txt."""
    if {"loss", "steps_per_second"} <= set(values):
        loss, speed = values["loss"], values["steps_per_second"]
        return f"(step={step:07d}) Train Loss: {loss:.4f}, Train Steps/Sec: {speed:.2f}"
    shown = ", ".join(f"{name}: {value:.4g}" for name, value in values.items())
    return f"(step={step:07d}) {shown}"


def _rates(step: int, total: int, values: Mapping[str, float]) -> str:
    """Returns images per second and the time to go, where they are known."""
    text = ""
    if "images_per_second" in values:
        text += f", Images/Sec: {values['images_per_second']:.4g}"
    if values.get("steps_per_second", 0) > 0:
        seconds = (total - step) / values["steps_per_second"]
        text += f", ETA: {tqdm.format_interval(seconds)}"
    return text


def _stamped(line: str) -> str:
    return f"[{time.strftime('%Y-%m-%d %H:%M:%S')}] {line}"


def _drop_later_steps(path: Path, last_step: int) -> None:
    """Drops lines of steps after `last_step` and half-written ones, all at once."""
    if path.exists():
        with open(path, "rb") as old, atomic_write(path) as name:
            name.write_bytes(b"".join(n for n in old if _step_of(n) <= last_step))


def _step_of(line: bytes) -> float:
    """Returns the step of a line of JSON; that of a torn one is after all others."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _write(file: BinaryIO, line: str) -> None:
    with _naming(file.name):
        file.write(f"{line}\n".encode())


@contextlib.contextmanager
def _naming(path: PathLike) -> Iterator[None]:
    """Names the file that cannot be written: a write's own error does not."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space, change the "
            "permissions or choose another --workdir"
        ) from error


# ---- other tools ----


class TensorBoard:
    """Writes TensorBoard's events, through tensorboardX's synchronous writer.

    Its SummaryWriter hands them to a thread instead, and waits for that thread for
    ever once a full disk has ended it.
    """

    def __init__(self, folder: Path, last_step: int):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._folder = folder
        folder.mkdir(exist_ok=True)
        # a second writer in the same second must not overwrite the first
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        start = SessionLog(status=SessionLog.START)  # hides this step and all later
        self._write(step=last_step + 1, session_log=start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers by name."""
        from tensorboardX.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._write(step=step, summary=Summary(value=points))

    def image(self, step: int, name: str, array: Image) -> None:
        """Records a picture."""
        from tensorboardX.summary import image

        self._write(step=step, summary=image(name, array, dataformats="HWC"))

    def close(self) -> None:
        """Ends the file."""
        with _naming(self._folder):
            self._writer.close()

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with _naming(self._folder):
            self._writer.write_event(Event(wall_time=time.time(), **fields))
            self._writer.flush()


class Wandb:
    """Logs to Weights & Biases. A resumed run goes on under the id in the workdir."""

    def __init__(self, workdir: Path, project: str):
        try:
            import wandb
        except ImportError as error:
            raise UserError("wandb is not installed: pip install wandb") from error
        self._image, path = wandb.Image, workdir / "wandb_id.txt"
        if not path.exists():
            path.write_text(secrets.token_hex(8))
        run_id = path.read_text().strip()
        try:
            self._run = wandb.init(
                project=project, dir=str(workdir), id=run_id, resume="allow"
            )
        except wandb.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"wandb: {reason}; WANDB_MODE=offline needs no account"
            ) from error
        # its own step counter refuses steps that a resumed run repeats
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Records numbers by name."""
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, array: Image) -> None:
        """Records a picture."""
        array = array[..., 0] if array.shape[-1] == 1 else array
        self._run.log({"step": step, name: self._image(array)})

    def close(self) -> None:
        """Ends the run there."""
        self._run.finish()


# ---- means and rates ----


@dataclasses.dataclass
class MetricsMeter:
    """Collects each step's metrics, and gives means and rates at every `every`-th step.

    Steps that were skipped, being not finite, do not enter the means.

    Args:
        every: Steps between two lines of the log.
        images_per_step: The batch size.
        flops_per_step: Floating point operations of a step.
        peak_flops: What the devices can do in a second; None where it is not known.
    """

    every: int
    images_per_step: int
    flops_per_step: float
    peak_flops: float | None

    def __post_init__(self):
        self._pending: collections.deque[Any] = collections.deque()
        self._restart()

    def add(
        self, step: int, metrics: Mapping[str, jax.Array], waited: float
    ) -> Iterator[ArrivedStep]:
        """Queues a step's metrics, and the seconds it has waited for data.

        Yields the steps that have arrived meanwhile.
        """
        self._pending.append((step, metrics))
        self._waited += waited
        return self.flush(leave=LAG)

    def flush(self, leave: int = 0) -> Iterator[ArrivedStep]:
        """Waits for all steps still queued but the last few, and yields them."""
        while len(self._pending) > leave:
            step, metrics = self._pending.popleft()
            metrics = jax.device_get(metrics)
            self._steps += 1
            for name, value in metrics.items():
                if value.ndim == 0 and name != "bad" and math.isfinite(value):
                    self._values[name].append(float(value))
            yield step, metrics, self._line() if step % self.every == 0 else None

    def pause(self, seconds: float) -> None:
        """Leaves out time that went into a save or a picture."""
        self._start += seconds

    def _line(self) -> dict[str, float]:
        rate = self._steps / max(time.perf_counter() - self._start, 1e-9)
        line = {name: statistics.fmean(v) for name, v in self._values.items()}
        line["steps_per_second"] = rate
        line["images_per_second"] = rate * self.images_per_step
        line["data_wait"] = self._waited / self._steps
        line["model_tflops"] = rate * self.flops_per_step / 1e12
        if self.peak_flops:
            line["mfu"] = rate * self.flops_per_step / self.peak_flops
        self._restart()
        return line

    def _restart(self) -> None:
        self._values: dict[str, list[float]] = collections.defaultdict(list)
        self._steps, self._waited, self._start = 0, 0.0, time.perf_counter()
