"""A run that moves from 8 devices to 1, to 2, to 4, step by step."""

import jax
import numpy as np
import pytest
from helpers import small

from sit_jax import checkpoint
from sit_jax.data.loader import batches
from sit_jax.data.sources import Synthetic
from sit_jax.parallel.mesh import make_mesh
from sit_jax.planning.programs import build_training_experiment, jit_train_step
from sit_jax.trainer.resume import (
    checkpoint_items,
    checkpoint_meta,
    read_history,
    restore_or_init,
)

STEPS = 4


@pytest.fixture(scope="module")
def setting():
    config = small.config()
    return config, build_training_experiment(config), Synthetic((4, 4, 1), 5)


def steps_on(setting, directory, devices, many):
    """Goes on for so many steps and saves; -> losses, params at first, labels seen."""
    config, parts, source = setting
    mesh = make_mesh(devices=jax.devices()[:devices])
    state, *_ = restore_or_init(parts, mesh, config.seed, directory)
    first, at_first = int(state.step), jax.device_get(state.params)
    size = config.batch_size
    where = jax.tree.map(lambda x: x.sharding, state)
    step = jit_train_step(config, parts, mesh, where)
    losses, seen = [], []
    with batches(source, size, config.seed, mesh, first=first * size) as feed:
        for _ in range(many):
            batch = next(feed)
            seen.append(jax.device_get(batch))
            state, metrics = step(state, parts.codec, batch, jax.random.key(0))
            losses.append(float(metrics["loss"]))
    items, meta = checkpoint_items(state), checkpoint_meta(state)
    skip, _ = read_history(directory, first, small.to_json(config), mesh)
    records = skip + (first + many) * config.batch_size
    about = {"config": small.to_json(config), "records": records, **meta}
    about["mesh"] = dict(mesh.shape)
    small.save(directory, first + many, about, **items)
    return losses, at_first, seen, jax.device_get(state.params)


def equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_8_1_2_4_devices(setting, tmp_path):
    stayed, _, data, _ = steps_on(setting, tmp_path / "stayed", 8, 4 * STEPS)
    losses, seen, before = [], [], None
    for devices in (8, 1, 2, 4):
        found, first, read, last = steps_on(setting, tmp_path / "moved", devices, STEPS)
        assert before is None or equal(first, before)  # to the last bit
        before = last
        losses, seen = losses + found, seen + read
    assert checkpoint.steps(tmp_path / "moved") == [4, 8, 12, 16]
    assert equal(seen, data)
    # sums over devices are in another order, and each step adds to what that moved
    np.testing.assert_allclose(losses, stayed, rtol=1e-5)
