"""Trees on a mesh, and steps saved of them."""

import jax
import numpy as np
import optax
import pytest

from sit_jax.checkpoint import Checkpoints
from sit_jax.parallel.mesh import make_mesh, with_shardings
from sit_jax.parallel.sharding_rules import zero1_shardings

META = {"step": 7, "config": {"model": {"depth": 2}, "clip": None}, "skipped": [1, 0]}


def trees(mesh, seed=0):
    """A state's items on a mesh, some leaves split over it, and what to load into."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    params = {"blocks": {"w": draw(2, 64, 256)}, "table": draw(2048, 16), "b": draw(3)}
    ema = jax.tree.map(lambda x: x / 3, params)
    opt_state = optax.adam(1e-3).init(params)
    opt_state = jax.tree.map(lambda x: np.asarray(x + 1), opt_state)
    state = {"params": params, "ema": ema, "opt_state": opt_state}
    where = zero1_shardings(mesh, state)
    like = with_shardings(jax.eval_shape(lambda: state), where)
    return jax.device_put(state, where), like


def mesh(n):
    return make_mesh(devices=jax.devices()[:n])


def saved(directory, state, *numbers, **options):
    saver = Checkpoints(directory, **options)
    for number in numbers:
        saver.save(number, {**META, "step": number}, **state)
        saver.wait()
    saver.close()


def equal(one, other):
    same = lambda a, b: a.dtype == b.dtype and np.array_equal(a, b)
    return jax.tree.all(jax.tree.map(same, jax.device_get(one), jax.device_get(other)))


@pytest.fixture(scope="module")
def one_step(tmp_path_factory):
    """-> directory with step 7, saved from eight devices."""
    directory = tmp_path_factory.mktemp("checkpoints")
    saved(directory, trees(mesh(8))[0], 7)
    return directory
