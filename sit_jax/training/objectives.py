"""The passes of a training step, and the sum of their gradients.

Every step has a plain pass. A model with .passes(key, shape) -> {prefix: inputs} has
others, at the same times but with other noise and dropped labels. If it also has
.ways(inputs, shape) -> (index, list of inputs), each pass is compiled once for every
entry, and of those a step runs the one that its index points to.
"""

from functools import partial

import jax
import jax.numpy as jnp

from sit_jax.adapters.apply import apply_model_for_training
from sit_jax.adapters.weights import join, with_dropout_keys
from sit_jax.diffusion.guidance import drop_labels


def drawn(model, key, keys, shape, given, drop):
    """-> {prefix: (inputs of the model, noise [B, ...], a key for each row)}.

    keys: four of the step's key; given: labels [B], some of which are dropped.
    """
    labels = drop_labels(keys[1], given, model.classes, drop)
    noise = jax.random.normal(keys[3], shape)
    rows = jax.random.split(jax.random.fold_in(key, 5), shape[0])
    passes = {"": ({"y": labels}, noise, rows)}
    for i, (prefix, inputs) in enumerate(_more(model, key, shape)):
        label_key, noise_key = (jax.random.fold_in(keys[j], i) for j in (1, 3))
        labels = drop_labels(label_key, given, model.classes, drop)
        noise = jax.random.normal(noise_key, shape)
        rows = jax.vmap(partial(jax.random.fold_in, data=i))(rows)
        passes[prefix] = ({"y": labels, **inputs}, noise, rows)
    return passes


def gradient(model, process, wants_rows):
    """-> grad(frozen, params, data, t, weights, passes) -> (gradients, terms).

    Of the sum of all passes' losses, with the terms' means over the batch. weights [B]
    or None multiply the losses; wants_rows: the terms of each row, before that, are
    there as "rows".
    """

    def loss(params, frozen, data, t, weights, noise, keys, inputs):
        net = partial(
            apply_model_for_training,
            model,
            with_dropout_keys(join(params, frozen), keys),
            **inputs,
        )
        rows = process.loss(net, data, noise, t)
        weighed = rows
        if weights is not None:
            weighed = jax.tree.map(lambda term: weights * term, rows)
        means = jax.tree.map(jnp.mean, weighed)
        return means["loss"], (means, rows if wants_rows else {})

    def grad(frozen, params, data, t, weights, passes):
        summed, terms, rows = None, {}, {}
        for prefix, (inputs, *others) in passes.items():
            index, ways = _ways(model, inputs, data.shape)
            slope = lambda way, *given: jax.grad(loss, has_aux=True)(*given, way)
            given = (params, frozen, data, t, weights, *others)
            each = [partial(slope, way) for way in ways]
            grads, (means, of_rows) = jax.lax.switch(index, each, *given)
            summed = jax.tree.map(jnp.add, summed, grads) if summed else grads
            terms |= {prefix + name: term for name, term in means.items()}
            rows |= {prefix + name: term for name, term in of_rows.items()}
        return summed, terms | ({"rows": rows} if rows else {})

    return grad


def total(passes, terms):
    """The sum of the passes' losses, in a dict with all their terms."""
    return sum(terms[prefix + "loss"] for prefix in passes)


def _more(model, key, shape):
    """-> (prefix, inputs) of each pass after the plain one, for a batch's shape.

    The keys of everything else are split or folded from key by other numbers than 4.
    """
    if not hasattr(model, "passes"):
        return []
    passes = model.passes(jax.random.fold_in(key, 4), shape)
    return [(prefix, inputs) for prefix, inputs in passes.items() if prefix]


def _ways(model, inputs, shape):
    return model.ways(inputs, shape) if hasattr(model, "ways") else (0, [inputs])
