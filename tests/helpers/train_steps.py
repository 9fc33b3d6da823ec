"""One compiled training step, its state and its batches."""

import types
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sit_jax.diffusion.interpolant import Interpolant
from sit_jax.models.codec import Pixels
from sit_jax.models.dit import SiT
from sit_jax.training.state import TrainState, init_params
from sit_jax.training.step import make_train_step, tensor_names

SHAPE, B = (8, 8, 2), 16
MODEL = SiT(depth=2, width=16, heads=2, patch=2, classes=5)
TX = optax.chain(optax.trace(0.0), optax.scale(-0.02))  # its state is the gradient


@cache
def weights():
    """Random ones everywhere: as drawn, most gradients would be zero."""
    init = partial(init_params, MODEL, SHAPE)
    params = jax.eval_shape(init, jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32)
    return jax.tree.map(draw, params)


def fresh():
    return TrainState.create(jax.tree.map(jnp.asarray, weights()), TX)


def batch(seed=0, n=B):
    rng = np.random.default_rng(seed)
    latent = rng.standard_normal((n, *SHAPE)).astype(np.float32)
    return {"latent": latent, "label": rng.integers(5, size=n).astype(np.int32)}


TRAIN_STEP = make_train_step(MODEL, Interpolant(), TX, ema_decay=0.9)
_compiled = jax.jit(TRAIN_STEP, donate_argnums=0)


def step(state, batch):
    return _compiled(state, Pixels(), batch, jax.random.key(1))


def relative(ours, theirs):
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    ours, theirs = flat(ours), flat(theirs)
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def equal(one, other):
    same = lambda a, b: np.array_equal(a, b)
    return jax.tree.all(jax.tree.map(same, jax.device_get(one), jax.device_get(other)))


def toy(apply, tx=TX):
    """One step of a model of two parameters; -> state, what of it was not finite."""
    params = {"a": {"w": jnp.ones(())}, "b": {"w": jnp.zeros(())}}
    model = types.SimpleNamespace(
        classes=5, apply=lambda variables, x, t, y: apply(variables["params"], x)
    )
    state = TrainState.create(params, tx)
    made = make_train_step(model, Interpolant(), tx)
    new, metrics = jax.jit(made)(state, Pixels(), batch(), jax.random.key(0))
    return new, tensor_names(state)[int(metrics["bad"])]
