"""One training step. Everything random in it follows from (key, step)."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from sit_jax import averages
from sit_jax.codec import data_of
from sit_jax.guidance import drop_labels
from sit_jax.models.applied import trained
from sit_jax.stored import dropping, join, split
from sit_jax.timesteps import quartiles


class TrainState(struct.PyTreeNode):
    step: jax.Array  # int [], batches seen
    params: dict
    ema: dict  # their moving averages, of which the first is sampled; see averages.py
    opt_state: optax.OptState
    skipped: jax.Array  # int [2]: steps without effect, all and in a row
    losses: Any = ()  # what the choice of times remembers, if it does; timesteps.py
    frozen: dict = struct.field(default_factory=dict)  # weights that are not trained


def init_params(model, shape, key):
    """shape (H, W, C) -> the model's freshly drawn parameters."""
    x, t, y = jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, int)
    return model.init(key, x, t, y)["params"]


def init_state(model, tx, shape, key, decay=0.9999, losses=()):
    """shape (H, W, C) -> TrainState; the average starts as a copy of the weights."""
    return fresh_state(tx, init_params(model, shape, key), decay, losses)


def fresh_state(tx, params, decay=0.9999, losses=()):
    """TrainState of step 0 around given parameters, of which adapters may be part."""
    zero, skipped = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.int32)
    params, frozen = split(params)
    ema = averages.begin(params, decay)
    return TrainState(zero, params, ema, tx.init(params), skipped, losses, frozen)


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
    are also given by quarters of the times. place(grads) -> grads: see placement.py.

    A model with .passes(key, shape) -> {prefix: inputs} is trained on the sum of the
    losses of all passes, at the same times but with other noise and dropped labels.
    """
    loss = _loss(model, process, by_quartile or timesteps is not None)

    def train_step(state, codec, batch, key):
        key = jax.random.fold_in(key, state.step)
        keys = jax.random.split(key, 4)
        data = data_of(codec, keys[0], batch)
        t, weights = _times(timesteps, process, keys[2], state.losses, len(data))
        passes = _passes(model, key, keys, data.shape, batch["label"], drop)
        grad = jax.grad(partial(loss, state.frozen), has_aux=True)
        grad = in_parts(grad, accumulate)
        grads, metrics = grad(state.params, data, t, weights, passes)
        rows = metrics.pop("rows", {})
        grads = place(grads)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(_total(passes, metrics)) & jnp.isfinite(norm)
        losses = state.losses
        if timesteps is not None:
            losses = timesteps.add(losses, t, _total(passes, rows))
        new = _updated(state, tx, grads, decay, good, losses)
        tensors = (data, state.params, grads)
        bad = jax.lax.cond(good, lambda _: -1, _first_bad, tensors)
        metrics |= {"grad_norm": norm, "bad": bad, "skipped": new.skipped}
        if by_quartile:
            metrics |= quartiles(rows, t, process.end)
        return new, metrics

    return train_step


def _loss(model, process, wants_rows):
    """-> loss(frozen, params, data, t, weights, passes) -> (total, terms).

    wants_rows: the terms of each row, before they are weighted, are there as "rows".
    """

    def loss(frozen, params, data, t, weights, passes):
        terms, params = {}, join(params, frozen)
        for prefix, (inputs, noise, keys) in passes.items():
            net = partial(trained, model, dropping(params, keys), **inputs)
            found = process.loss(net, data, noise, t)
            terms |= {prefix + name: term for name, term in found.items()}
        rows = {"rows": terms} if wants_rows else {}
        if weights is not None:
            terms = jax.tree.map(lambda term: weights * term, terms)
        means = jax.tree.map(jnp.mean, terms)
        return _total(passes, means), means | rows

    return loss


def _passes(model, key, keys, shape, given, drop):
    """-> {prefix: (inputs of the model, noise [B, ...], a key for each row)}.

    keys: four of the step's key; given: labels [B], some of which are dropped.
    """
    labels = drop_labels(keys[1], given, model.classes, drop)
    noise = jax.random.normal(keys[3], shape)
    rows = jax.random.split(jax.random.fold_in(key, 5), shape[0])
    passes = {"": ({"y": labels}, noise, rows)}
    for i, (prefix, inputs) in enumerate(_more_passes(model, key, shape)):
        label_key, noise_key = (jax.random.fold_in(keys[j], i) for j in (1, 3))
        labels = drop_labels(label_key, given, model.classes, drop)
        noise = jax.random.normal(noise_key, shape)
        rows = jax.vmap(partial(jax.random.fold_in, data=i))(rows)
        passes[prefix] = ({"y": labels, **inputs}, noise, rows)
    return passes


def in_parts(grad, parts):
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


def _more_passes(model, key, shape):
    """-> (prefix, inputs) of each pass after the plain one, for a batch's shape.

    The keys of everything else are split or folded from key by other numbers than 4.
    """
    if not hasattr(model, "passes"):
        return []
    passes = model.passes(jax.random.fold_in(key, 4), shape)
    return [(prefix, inputs) for prefix, inputs in passes.items() if prefix]


def _total(passes, terms):
    """The sum of the passes' losses, in a dict with all their terms."""
    total = terms["loss"]
    for prefix in passes:
        total = total + terms[prefix + "loss"] if prefix else total
    return total


def _updated(state, tx, grads, decay, good, losses):
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = averages.update(state.ema, params, decay)
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
