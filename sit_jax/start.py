"""Where a run begins: with fresh weights, where it left off, or with given ones."""

from functools import partial

import jax
import numpy as np

from sit_jax import checkpoint
from sit_jax.sharding import everywhere, shaped, split_weights
from sit_jax.training import TrainState, init_state


def begin(parts, mesh, seed, directory, given=None):
    """-> TrainState on the mesh, and a sentence saying where it comes from.

    directory: the run's own checkpoints; given: a workdir or checkpoint directory to
    take weights from while the run has none of its own. An optimizer state found there
    is taken too, with its step; without one the weights start a run at step 0.
    """
    init = partial(init_state, parts.model, parts.tx, parts.shape)
    key = jax.random.key(seed)
    shapes = jax.eval_shape(init, key)
    where = split_weights(mesh, shapes)
    target = shaped(shapes, where)
    if own := checkpoint.steps(directory):
        return restore(directory, own[-1], target), f"goes on from step {own[-1]}"
    if given is None:
        return jax.jit(init, out_shardings=where)(key), "starts with fresh weights"
    directory, step = checkpoint.find(given)
    if "opt_state" in checkpoint.items(directory, step):
        state = restore(directory, step, target)
        return state, f"goes on from {given}, step {int(state.step)}"
    found = checkpoint.load(directory, step, params=target.params, ema=target.ema)
    opt_state = jax.jit(parts.tx.init, out_shardings=where.opt_state)(found["params"])
    state = _state(0, (0, 0), {**found, "opt_state": opt_state}, mesh)
    return state, f"starts from the weights of {given}, optimizer and step new"


def restore(directory, step, target):
    """-> the TrainState that was saved, placed as target says."""
    names = ("params", "ema", "opt_state")
    like = {name: getattr(target, name) for name in names}
    found = checkpoint.load(directory, step, **like)
    meta = checkpoint.read_meta(directory, step)
    mesh = target.step.sharding.mesh
    return _state(meta["step"], meta.get("skipped", (0, 0)), found, mesh)


def pack(state):
    """TrainState -> the items of a checkpoint, and its part of the meta."""
    items = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}
    return items, {"step": int(state.step), "skipped": state.skipped.tolist()}


def _state(step, skipped, items, mesh):
    put = lambda x: jax.device_put(np.asarray(x, np.int32), everywhere(mesh))
    return TrainState(step=put(step), skipped=put(skipped), **items)
