"""FID-k of the average in training, with a toy in the place of Inception."""

import numpy as np
import pytest
from helpers import small
from helpers.curve_config import Pictures, Toy, config

from sit_jax.config import spec
from sit_jax.convert import inception
from sit_jax.errors import UserError
from sit_jax.evaluation.fid import Gaussian, frechet_distance
from sit_jax.experiment import build_experiment, check_reference
from sit_jax.parallel.mesh import make_mesh
from sit_jax.planning.programs import build_training_experiment
from sit_jax.sampling.batch_sampler import BatchSampler
from sit_jax.trainer.previews import Previews


class Log:
    def __init__(self):
        self.said, self.values = [], {}

    def say(self, line):
        self.said.append(line)

    def scalars(self, step, values):
        self.values[step] = values


def test_points_of_a_curve_are_of_images_as_sample_py_draws_them():
    """Also where the network is trained in bfloat16, by the word precision.model."""
    c, log, mesh = config(), Log(), make_mesh(data=-1, fsdp=1)
    c.precision.training = "bf16"
    parts = build_experiment(c)
    params = small.random_params(parts, 0)
    look = Previews(log, c, build_training_experiment(c), mesh)
    seconds = [look.draw(step, params) for step in range(1, 9)]
    assert [s > 0 for s in seconds] == [s in (3, 6, 8) for s in range(1, 9)]
    assert set(log.values) == {3, 6, 8} and log.values[3] == log.values[8]
    draw = BatchSampler(parts, params, mesh, 20)
    ((data, _),) = draw(0, np.arange(20, dtype=np.int32) % 5)
    drawn = np.asarray(parts.codec.decode(data)).repeat(3, -1)
    there = np.stack([each["image"] for each in Pictures()]).repeat(3, -1)
    ours, theirs = (Gaussian.of(next(Toy()([x]))["pool"]) for x in (drawn, there))
    assert log.values[3] == {
        "frechet_20": pytest.approx(frechet_distance(ours, theirs), 1e-6)
    }


def test_without_weights_there_is_one_line_and_no_curve(monkeypatch, tmp_path):
    monkeypatch.setattr(inception, "places", lambda: [tmp_path / "none"])
    c, log = config(features=None), Log()
    look = Previews(log, c, build_experiment(c), make_mesh(data=-1, fsdp=1))
    assert look.draw(3, None) == 0 and log.values == {}
    (line,) = log.said
    assert line.startswith("no curve of FIDs: no Inception weights; put pt_inception")


def test_latents_have_no_curve():
    from sit_jax.models.codec import Latents

    c, log = config(codec=spec(Latents)), Log()
    Previews(log, c, build_experiment(c), make_mesh(data=-1, fsdp=1))
    assert log.said[0].startswith("no curve of FIDs: latents need a VAE")


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(reference=None), "evaluate_every needs a reference"),
        (dict(reference="nowhere.npz"), "no file at nowhere.npz"),
    ],
)
def test_what_makes_no_curve_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        check_reference(config(**fields))
