"""sample.py --num, extract_features.py and evaluate.py, killed at ten random moments.

Five minutes: pytest tests/slow/test_killed_work.py
"""

import random
import time

import pytest
import works

KILLS = 10
STARTING = 3  # of them before anything is computed, or in the first batches


@pytest.mark.parametrize(
    "make, kills",
    [
        (works.sampling, KILLS),
        (works.extraction, KILLS),
        (works.evaluation, KILLS),
        (works.statistics, 4),
    ],
    ids=["sample", "extract", "evaluate", "statistics"],
)
def test_ten_kills_and_the_same_bytes(tmp_path, make, kills):
    """The last falls where all batches are there, and the output is made of them."""
    inputs, place = tmp_path / "inputs", tmp_path / "place"
    inputs.mkdir(), place.mkdir()
    work, rng, done = make(inputs), random.Random(11), []
    unbroken = work.unbroken(place)
    early = STARTING if kills == KILLS else 1
    goals = sorted(rng.sample(range(2, work.whole), kills - early - 1))
    for goal in [0] * early + goals + [work.whole]:
        process = work.begin(place)
        works.ready(process)
        while work.parts(place) < goal and process.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05) if goal else rng.uniform(0, 3))
        alive = process.poll() is None
        works.kill(process)
        done.append(work.parts(place) if alive else -1)
    assert done.count(-1) <= 1, done  # the last one may have come too late
    print(f"killed after {done} of {work.whole} batches")
    if -1 not in done:
        works.ended(work.begin(place))
    assert work.contents(place) == unbroken
