"""Checkpoints on gs://: their marks, damage, and drafts that become objects."""

import pytest
from helpers import checkpoints
from helpers.checkpoints import Memory, step

from sit_jax import checkpoint
from sit_jax.checkpoint import restore_newest, steps
from sit_jax.checkpoint.checksums import damages
from sit_jax.errors import UserError
from sit_jax.files import COMMIT_FILE, atomic_write, list_files

bucket = checkpoints.bucket


def test_a_directory_of_steps_is_sent_mark_last(bucket):
    target = bucket / "ported"
    step(target, 3)  # of before
    with atomic_write(target) as name:
        (name / "7" / "params").mkdir(parents=True)
        for file in ("params/x", "x", COMMIT_FILE):
            (name / "7" / file).write_text("")
    assert Memory.sent[-1] == f"gs://here/ported/7/{COMMIT_FILE}"
    assert steps(target) == [7]


def test_steps_are_those_with_their_mark(bucket):
    folder = bucket / "run" / "checkpoints"
    assert steps(folder) == []
    for number, mark in ((5, True), (10, True), (15, False)):
        step(folder, number, mark)
    (folder / "10.damaged" / "x").write_text("x")
    assert steps(folder) == [5, 10]
    assert checkpoint.find_step("gs://here/run") == (folder, 10)
    assert checkpoint.find_step("gs://here/run/checkpoints/5") == (folder, 5)
    assert checkpoint.items(folder, 5) == {"params", "meta"}
    with pytest.raises(UserError, match="no checkpoint in gs://here/none"):
        checkpoint.find_step("gs://here/none")


@pytest.mark.parametrize("what", ["flipped", "missing", "more"])
def test_damage_in_a_bucket_is_noticed(bucket, what):
    at = step(bucket, 5)
    assert damages(at) == []
    file = at / "params" / "d" / "0"
    if what == "flipped":
        file.write_text("params/d/0 of 6")
    elif what == "missing":
        file.unlink()
    else:
        (at / "params" / "new").write_text("")
    (said,) = damages(at)
    words = {
        "flipped": "d/0 differs",
        "missing": "d/0 is missing",
        "more": "new has no",
    }
    assert f"params/{words[what]}" in said
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.require_intact(bucket, 5)


def test_a_damaged_step_is_set_aside(bucket):
    step(bucket, 4)
    (step(bucket, 5) / "params" / "manifest").unlink()
    before = {f"5.damaged/{n}" for n in list_files(bucket / "5")}
    restored, lines = restore_newest(bucket, lambda number: number)
    assert restored == 4 and "5.damaged" in lines[1]
    assert steps(bucket) == [4] and before <= set(list_files(bucket))
