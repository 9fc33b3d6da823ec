"""A run that goes on otherwise than before says so, and goes on in its data."""

import copy

import numpy as np
import pytest
import small

from sit_jax.config import to_json
from sit_jax.parallel.mesh import make_mesh
from sit_jax.trainer.history import history

NOW = to_json(small.config())
MESH = make_mesh()


def before(**changes):
    config = copy.deepcopy(NOW)
    config.update(changes)
    return config


def saved(directory, step, meta):
    small.save(directory, step, meta, params={"w": np.zeros(3)})
    return directory


def test_a_run_that_begins_has_no_past(tmp_path):
    past = history(tmp_path / "none", 5, NOW, MESH)
    assert past.changes == () and past.skip == 0
    assert past.meta(6) == {"records": 48, "mesh": dict(MESH.shape)}


def test_the_same_settings_go_on_silently(tmp_path):
    past = history(tmp_path / "none", 0, NOW, MESH)
    saved(tmp_path, 5, {"config": NOW, **past.meta(5)})
    again = history(tmp_path, 5, NOW, MESH)
    assert again.changes == () and again.skip == 0


def test_other_settings_are_told(tmp_path):
    mesh = {"data": 2, "fsdp": 4}
    config = before(keep_last=7, mesh={"data": 2, "fsdp": 4})
    saved(tmp_path, 5, {"config": config, "records": 40, "mesh": mesh})
    assert history(tmp_path, 5, NOW, MESH).changes == (
        "keep_last was 7, is 3",
        "saved on 8 devices (data 2 x fsdp 4 x tensor 1), goes on on 8 devices "
        "(data 1 x fsdp 8 x tensor 1)",
    )


@pytest.mark.parametrize("told", [{"records": 80}, {}])
def test_batches_of_another_size_go_on_behind_the_last_record(tmp_path, told):
    """Without the number, of a checkpoint from before it was kept, it is 5 x 16."""
    saved(tmp_path, 5, {"config": before(batch_size=16), **told})
    past = history(tmp_path, 5, NOW, MESH)
    assert past.changes[0] == "batch_size was 16, is 8"
    assert past.changes[1].startswith("from record 80 on a step takes 8; the learning")
    assert 5 * 8 + past.skip == 80 and past.meta(6)["records"] == 88
    saved(tmp_path, 7, {"config": NOW, **past.meta(7)})
    assert history(tmp_path, 7, NOW, MESH).skip == past.skip  # and once more
