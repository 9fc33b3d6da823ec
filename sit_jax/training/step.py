"""One training step. Everything random in it follows from (key, step)."""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from sit_jax.diffusion.timesteps import quartile_means
from sit_jax.models.codec import codec_sample
from sit_jax.training import objectives
from sit_jax.training.state import TrainState, update_ema


def make_train_step(
    model,
    process,
    tx,
    decay=0.9999,
    drop=0.1,
    accumulate=1,
    timesteps=None,
    by_quartile=False,
    place=lambda grads: grads,
):
    """-> step(state, codec, batch, key) -> (state, metrics).

    batch: {"latent" | "moments" | "image": [B, ...], "label": int [B]}. A step whose
    loss or gradient is not finite leaves the weights as they were; it is counted, and
    metrics["bad"] is the place of the first such tensor in tensor_names(state).
    accumulate > 1 goes through the batch in that many parts, for the same gradient.
    timesteps: see timesteps.py; None: the process draws its times. by_quartile: losses
    are also given by quarters of the times. place(grads) -> grads:
    see sharding_rules.py.

    A model with several passes is trained on the sum of their losses: see passes.py.
    """
    gradient = objectives.gradient(model, process, by_quartile or timesteps is not None)

    def train_step(state, codec, batch, key):
        key = jax.random.fold_in(key, state.step)
        keys = jax.random.split(key, 4)
        data = codec_sample(codec, keys[0], batch)
        t, weights = _times(timesteps, process, keys[2], state.losses, len(data))
        each = objectives.drawn(model, key, keys, data.shape, batch["label"], drop)
        grad = accumulate_gradients(partial(gradient, state.frozen), accumulate)
        grads, metrics = grad(state.params, data, t, weights, each)
        rows = metrics.pop("rows", {})
        grads = place(grads)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(objectives.total(each, metrics)) & jnp.isfinite(norm)
        losses = state.losses
        if timesteps is not None:
            losses = timesteps.add(losses, t, objectives.total(each, rows))
        new = _updated(state, tx, grads, decay, good, losses)
        tensors = (data, state.params, grads)
        bad = jax.lax.cond(good, lambda _: -1, _first_bad, tensors)
        metrics |= {"grad_norm": norm, "bad": bad, "skipped": new.skipped}
        if by_quartile:
            metrics |= quartile_means(rows, t, process.end)
        return new, metrics

    return train_step


def accumulate_gradients(grad, parts):
    """Averages grad(params, *batch) over `parts` equal parts of the batch.

    Part j takes every parts-th row from row j on, so that each device keeps its rows.
    Of the metrics, "rows" are one for each of the batch and are put back in order.
    """
    if parts == 1:
        return grad

    def averaged(params, *batch):
        split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

        def one(*part):
            grads, metrics = grad(params, *part)
            rows = metrics.pop("rows", {})
            return (grads, metrics), rows

        def add(total, part):
            found, rows = one(*part)
            return jax.tree.map(jnp.add, total, found), rows

        split_batch = jax.tree.map(split, batch)
        first = jax.tree.map(lambda x: x[0], split_batch)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(one, *first)[0])
        total, rows = jax.lax.scan(add, zero, split_batch)
        grads, metrics = jax.tree.map(lambda x: x / parts, total)
        join = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])
        rows = {"rows": jax.tree.map(join, rows)} if rows else {}
        return grads, metrics | rows

    return averaged


def tensor_names(state):
    """Names for metrics["bad"]: the batch, the parameters, their gradients.

    The last stands for -1: all of these are finite, but the loss or a norm is not.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state.params)
    keystr = partial(jax.tree_util.keystr, simple=True, separator="/")
    names = [keystr(path) for path, _ in leaves]
    gradients = [f"gradient of {name}" for name in names]
    return ["the batch", *names, *gradients, "the loss or the norm of its gradient"]


def _times(timesteps, process, key, losses, n):
    """-> t [n], and what their losses are multiplied by: [n], or None for nothing."""
    if timesteps is None:
        return process.times(key, n), None
    return timesteps.draw(process, key, losses, n)


def _updated(state, tx, grads, decay, good, losses):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = update_ema(state.ema, params, decay)
    keep = lambda new, old: jnp.where(good, new, old)
    params, ema, opt_state, losses = jax.tree.map(
        keep,
        (params, ema, opt_state, losses),
        (state.params, state.ema, state.opt_state, state.losses),
    )
    total, streak = state.skipped
    skipped = jnp.where(good, jnp.stack([total, 0]), jnp.stack([total, streak]) + 1)
    new = (state.step + 1, params, ema, opt_state, skipped, losses)
    return TrainState(*new, state.frozen)


def _first_bad(tensors):
    """Index of the first tensor with a value that is not finite, -1 without one."""
    # 0 * inf is not a number; compiles to fewer kernels than isfinite(leaf).all()
    zero = lambda leaf: jnp.sum(0 * leaf)
    bad = jnp.isnan(jnp.stack([zero(leaf) for leaf in jax.tree.leaves(tensors)]))
    return jnp.where(bad.any(), jnp.argmax(bad), -1)
