"""The curve of FIDs in training, in two and four real processes."""

import pytest
from helpers import processes, small


def curve(count, workdir):
    """-> {step: distance} of a run by so many processes."""
    said = processes.run(
        count,
        *("train.py", "--config", "tests/helpers/curve_config.py", "--config.steps=6"),
        *("--workdir", workdir),
    )
    assert said.count("judged step") == 2
    seen = small.lines(workdir)
    return {x["step"]: x["frechet_20"] for x in seen if "frechet_20" in x}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The curve of one process."""
    return curve(1, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("count", [2, 4])
def test_the_curve_on_many_is_that_of_one(tmp_path, alone, count):
    """All hosts draw all images, and the first one logs.

    To 1 %: weights to 1e-5 move some of the pictures' values to the next level.
    """
    many = curve(count, tmp_path)
    assert list(many) == [3, 6] and min(many.values()) > 0
    assert many == pytest.approx(alone, rel=1e-2)
