"""sample.py --num, extract_features.py and evaluate.py, killed at ten random moments.

Three minutes: pytest tests/slow/test_killed_work.py
"""

import random
import time

import pytest
from helpers import commands

KILLS = 10
STARTING = 3  # of them before anything is computed, or in the first batches


@pytest.mark.parametrize(
    "make, kills",
    [
        (commands.sampling, KILLS),
        (commands.extraction, KILLS),
        (commands.evaluation, KILLS),
        (commands.statistics, 4),
    ],
    ids=["sample", "extract", "evaluate", "statistics"],
)
def test_ten_kills_and_the_same_bytes(tmp_path, make, kills):
    """The last falls where all batches are there, and the output is made of them."""
    inputs, place = tmp_path / "inputs", tmp_path / "place"
    inputs.mkdir(), place.mkdir()
    work, rng, done = make(inputs), random.Random(11), []
    unbroken = work.unbroken(place)
    for left in reversed(range(kills)):
        process, before = work.begin(place), work.parts(place)
        commands.ready(process)
        more = rng.uniform(0, 2) * (work.whole - before) / (left + 1)
        goal = min(before + int(more), work.whole) if left else work.whole
        until = time.monotonic() + rng.uniform(0, 1.5)  # for those that begin
        while work.parts(place) < goal and process.poll() is None:
            if left >= kills - STARTING and time.monotonic() > until:
                break
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03))
        alive = process.poll() is None
        commands.kill(process)
        done.append(work.parts(place) if alive else -1)
    print(f"killed after {done} of {work.whole} batches")
    assert done.count(-1) <= 1, done  # the last one may have come too late
    if -1 not in done:
        commands.ended(work.begin(place))
    assert work.contents(place) == unbroken
