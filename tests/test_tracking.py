"""TensorBoard and wandb beside the log: with them, without, and going on."""

import io
import sys
import types

import numpy as np
import pytest
from logs import events, run, steps_of

from sit_jax.errors import UserError
from sit_jax.trainer.logging import RunLog


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
    with Image.open(io.BytesIO(shown[0].encoded_image_string)) as image:
        np.testing.assert_array_equal(np.asarray(image)[..., :1], picture)


def test_without_tensorboard_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    said = run(tmp_path, [1])
    assert said.count("no TensorBoard files") == 1
    assert "pip install tensorboardX" in said
    assert steps_of(tmp_path) == [1] and not (tmp_path / "tensorboard").exists()


def test_wandb_gets_all_events_and_the_same_id_after_a_restart(tmp_path, wandb):
    picture = np.zeros((4, 6, 1), np.uint8)
    for first in (0, 10):
        with RunLog(tmp_path, 99, first, {"project": "p"}, io.StringIO()) as log:
            log.scalars(first + 5, {"loss": 0.5})
            log.image(first + 5, "samples", picture)
            log.close()
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
        run(tmp_path, [], wandb={})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        run(tmp_path, [], wandb={})
