"""One training step. Everything random in it follows from (key, step)."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import struct

from sit_jax.codec import data_of
from sit_jax.guidance import drop_labels


class TrainState(struct.PyTreeNode):
    step: jax.Array  # int [], batches seen
    params: dict
    ema: dict  # their moving average, which is what is sampled
    opt_state: optax.OptState
    skipped: jax.Array  # int [2]: steps without effect, all and in a row


def init_params(model, shape, key):
    """shape (H, W, C) -> the model's freshly drawn parameters."""
    x, t, y = jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, int)
    return model.init(key, x, t, y)["params"]


def init_state(model, tx, shape, key):
    """shape (H, W, C) -> TrainState; the average starts as a copy of the weights."""
    return fresh_state(tx, init_params(model, shape, key))


def fresh_state(tx, params):
    """TrainState of step 0 around given parameters."""
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, params)  # a buffer of its own: the state is donated
    return TrainState(zero, params, ema, tx.init(params), jnp.zeros(2, jnp.int32))


def make_train_step(model, process, tx, decay=0.9999, drop=0.1, accumulate=1):
    """-> step(state, codec, batch, key) -> (state, metrics).

    batch: {"latent" | "moments" | "image": [B, ...], "label": int [B]}. A step whose
    loss or gradient is not finite leaves the weights as they were; it is counted, and
    metrics["bad"] is the place of the first such tensor in tensor_names(state).
    accumulate > 1 goes through the batch in that many parts, for the same gradient.
    """

    def loss(params, data, labels, t, noise):
        net = partial(model.apply, {"params": params}, y=labels)
        terms = process.loss(net, data, noise, t)
        means = jax.tree.map(jnp.mean, terms)
        return means["loss"], means

    grad = in_parts(jax.grad(loss, has_aux=True), accumulate)

    def train_step(state, codec, batch, key):
        keys = jax.random.split(jax.random.fold_in(key, state.step), 4)
        data = data_of(codec, keys[0], batch)
        labels = drop_labels(keys[1], batch["label"], model.classes, drop)
        t = process.times(keys[2], len(data))
        noise = jax.random.normal(keys[3], data.shape)
        grads, metrics = grad(state.params, data, labels, t, noise)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        new = _updated(state, tx, grads, decay, good)
        tensors = (data, state.params, grads)
        bad = jax.lax.cond(good, lambda _: -1, _first_bad, tensors)
        metrics |= {"grad_norm": norm, "bad": bad, "skipped": new.skipped}
        return new, metrics

    return train_step


def in_parts(grad, parts):
    """Averages grad(params, *batch) over `parts` equal parts of the batch.

    Part j takes every parts-th row from row j on, so that each device keeps its rows.
    """
    if parts == 1:
        return grad

    def averaged(params, *batch):
        split = lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

        def add(total, part):
            return jax.tree.map(jnp.add, total, grad(params, *part)), None

        split_batch = jax.tree.map(split, batch)
        first = jax.tree.map(lambda x: x[0], split_batch)
        zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad, params, *first))
        total, _ = jax.lax.scan(add, zero, split_batch)
        return jax.tree.map(lambda x: x / parts, total)

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


def _updated(state, tx, grads, decay, good):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, 1 - decay)
    keep = lambda new, old: jnp.where(good, new, old)
    params, ema, opt_state = jax.tree.map(
        keep, (params, ema, opt_state), (state.params, state.ema, state.opt_state)
    )
    total, streak = state.skipped
    skipped = jnp.where(good, jnp.stack([total, 0]), jnp.stack([total, streak]) + 1)
    return TrainState(state.step + 1, params, ema, opt_state, skipped)


def _first_bad(tensors):
    """Index of the first tensor with a value that is not finite, -1 without one."""
    bad = [~jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tensors)]
    bad = jnp.stack(bad)
    return jnp.where(bad.any(), jnp.argmax(bad), -1)
