"""A short logged run, and what its files hold."""

import io
import json

import pytest

from sit_jax.trainer.run_log import RunLog

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
