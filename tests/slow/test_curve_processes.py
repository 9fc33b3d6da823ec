"""The curve of FIDs in training, in two and four real processes."""

import processes
import pytest
import small


@pytest.mark.parametrize("count", [2, 4])
def test_the_curve_on_many_is_that_of_one(tmp_path, count):
    """All hosts draw all images, and the first one logs.

    To 1 %: weights to 1e-5 move some of the pictures' values to the next level.
    """
    run = lambda n: processes.run(
        n,
        *("train.py", "--config", "tests/curve_config.py", "--config.steps=6"),
        *("--workdir", tmp_path / str(n)),
    )
    curves = []
    for n in (1, count):
        assert run(n).count("judged step") == 2
        seen = small.lines(tmp_path / str(n))
        curves.append({x["step"]: x["frechet_20"] for x in seen if "frechet_20" in x})
    assert list(curves[1]) == [3, 6] and min(curves[1].values()) > 0
    assert curves[1] == pytest.approx(curves[0], rel=1e-2)
