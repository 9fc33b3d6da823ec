"""Several averages of what is trained: saved, taken up again, refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import small
from helpers.networks import quick_jit

from sit_jax import checkpoint
from sit_jax.config import spec, to_json
from sit_jax.convert.open import WeightsRef
from sit_jax.diffusion.gaussian import GaussianDiffusion
from sit_jax.diffusion.timesteps import LossSecondMoment
from sit_jax.errors import UserError
from sit_jax.experiment import TRAINING, build_experiment
from sit_jax.models.dit import DiT
from sit_jax.models.mdt import MDT, MDTv2
from sit_jax.parallel.mesh import make_mesh
from sit_jax.samplers.ddpm import DDPM
from sit_jax.trainer import resume

pytestmark = pytest.mark.slow  # together they compile for a minute


def config(*rates):
    c = small.config()
    c.model = spec(DiT, depth=1, width=8, heads=1, classes=5)
    c.process = spec(GaussianDiffusion)
    c.optimizer = spec(optax.sgd, learning_rate=0.1)
    c.sampler = spec(DDPM, steps=2)
    c.timesteps = spec(LossSecondMoment, history=1)
    with c.ignore_type():
        c.ema_decay = rates if len(rates) > 1 else rates[0]
    return c


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A state of step 3 with nothing in it equal, and its checkpoint."""
    c = config(0.9, 0.5)
    parts, mesh = build_experiment(c, TRAINING), make_mesh()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", quick_jit)
        state, told, _ = resume.restore_or_init(parts, mesh, 0, "nowhere")
    assert told == "starts with fresh weights"
    rng = np.random.default_rng(0)
    unlike = lambda x: rng.permutation(x.size).reshape(x.shape).astype(x.dtype)
    state = jax.tree.map(lambda x: jax.device_put(unlike(x), x.sharding), state)
    state = state.replace(step=jnp.int32(3), skipped_steps=jnp.array([1, 0]))
    items = resume.checkpoint_items(state)
    meta = resume.checkpoint_meta(state)
    folder = tmp_path_factory.mktemp("saved") / "ck"
    small.save(folder, 3, {"config": to_json(c), **meta}, **items)
    return folder, jax.device_get(state)


def begun(given, *rates):
    parts = build_experiment(config(*rates), TRAINING)
    weights = WeightsRef(given)
    return resume.restore_or_init(parts, make_mesh(), 0, "nowhere", weights)[0]


def equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_every_average_and_what_chose_the_times_come_back(saved):
    folder, state = saved
    items = {"params", "ema", "ema_0.5", "opt_state", "losses", "meta"}
    assert items <= checkpoint.items(folder, 3)
    assert equal(begun(folder, 0.9, 0.5), state)
    own, told, _ = resume.restore_or_init(
        build_experiment(config(0.9, 0.5), TRAINING), make_mesh(), 0, folder
    )
    assert equal(own, state) and told == "goes on from step 3"
    parts = build_experiment(config(0.9, 0.5), TRAINING)
    sampled = resume.open_weights(folder, None).load("ema", parts, make_mesh(-1, 1))
    assert equal(sampled, state.ema["ema"])


def test_other_rates_begin_from_the_first_average(saved):
    folder, state = saved
    assert equal(begun(folder, 0.9, 0.8).ema["ema_0.8"], state.ema["ema"])
    one = begun(folder, 0.99)
    assert equal(one.ema["ema"], state.ema["ema"]) and int(one.step) == 3


@pytest.mark.parametrize("kind", [MDT, MDTv2])
def test_weights_of_the_other_version_are_refused_by_both_names(kind, tmp_path):
    c, other = config(0.9), {MDT: MDTv2, MDTv2: MDT}[kind]
    c.model = spec(kind, depth=3, decoder=1, width=8, heads=1, classes=5)
    few = {"w": np.ones(1)}
    meta = {"config": to_json(c), "step": 0}
    small.save(tmp_path / "given", 0, meta, params=few, ema=few)
    parts = dataclasses.replace(
        build_experiment(c, TRAINING), model=other(depth=3, decoder=1, width=8, heads=1)
    )
    names = f"an {kind.__name__}, but the config's network is an {other.__name__}$"
    with pytest.raises(UserError, match=f"given holds the weights of {names}"):
        given = WeightsRef(tmp_path / "given")
        resume.restore_or_init(parts, make_mesh(), 0, tmp_path / "run", given)
