"""What a training step asks of the network: one pass, or with MDT a masked one too.

The loss is the sum of all passes' losses. They are differentiated one after the other:
only one pass's activations are in memory, and of a pass that is compiled for several
numbers of tokens only one program runs.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sit_jax.adapters.apply import apply_model_for_training
from sit_jax.adapters.weights import join, with_dropout_keys
from sit_jax.diffusion.guidance import drop_labels
from sit_jax.diffusion.rng import StepKeys
from sit_jax.typing import (
    Batch,
    Keys,
    Labels,
    MaskedModel,
    Params,
    PerImage,
    Process,
    Time,
)

Terms = dict[str, Array]


class Pass(NamedTuple):
    """One forward and backward pass through the network."""

    inputs: Mapping[str, Array]  # of the network beside x and t: labels "y", masks
    noise: Batch
    dropout_keys: Keys


class StepInputs(NamedTuple):
    """What a step's loss is computed of."""

    data: Batch
    t: Time
    weights: PerImage | None  # that losses are multiplied by
    passes: Mapping[str, Pass]  # by what begins the names of a pass's metrics


def make_passes(
    model: Any,
    keys: StepKeys,
    labels: Labels,
    shape: tuple[int, ...],
    label_dropout: float,
) -> dict[str, Pass]:
    """Returns the plain pass, and those in which a MaskedModel hides tokens.

    These are at the same times, but with other noise and other dropped labels.

    Args:
      model: a network; `classes` is its null label.
      keys: of the step.
      labels: [b], of which a share is replaced by the null label.
      shape: of the batch, (b, h, w, c).
      label_dropout: that share.

    Source: Gao et al., arXiv:2303.14389 (MDT), section 3.3.
    """

    def make_pass(
        label_key: Array, noise_key: Array, dropout_keys: Keys, masks: Mapping
    ) -> Pass:
        y = drop_labels(label_key, labels, model.classes, label_dropout)
        noise = jax.random.normal(noise_key, shape)
        return Pass({"y": y, **masks}, noise, dropout_keys)

    dropout_keys = jax.random.split(keys.dropout, shape[0])
    passes = {"": make_pass(keys.labels, keys.noise, dropout_keys, {})}
    if not isinstance(model, MaskedModel):
        return passes
    masks = model.pass_inputs(keys.mask, shape)
    for i, prefix in enumerate(prefix for prefix in masks if prefix):
        fold_in = partial(jax.random.fold_in, data=i)
        dropout_keys = jax.vmap(fold_in)(dropout_keys)
        label_key, noise_key = fold_in(keys.labels), fold_in(keys.noise)
        passes[prefix] = make_pass(label_key, noise_key, dropout_keys, masks[prefix])
    return passes


def value_and_grad(
    model: Any,
    process: Process,
    frozen_params: Params,
    params: Params,
    batch: StepInputs,
) -> tuple[Params, Terms, Terms]:
    """Returns the gradient of the sum of all passes' losses, and their terms.

    Args:
      model: the network.
      process: whose losses these are.
      frozen_params: weights that are not trained; {} for none.
      params: weights that are.
      batch: data, times and passes.

    Returns:
      The gradient, means over the batch of weighted terms by name, and terms of each
      image without the weights.
    """

    def loss(
        params: Params, noise: Batch, keys: Keys, inputs: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], tuple[Terms, Terms]]:
        all_params = with_dropout_keys(join(params, frozen_params), keys)
        net = partial(apply_model_for_training, model, all_params, **inputs)
        rows = process.losses(net, batch.data, noise, batch.t)
        scaled = rows
        if batch.weights is not None:
            scaled = jax.tree.map(lambda term: batch.weights * term, rows)
        means = jax.tree.map(jnp.mean, scaled)
        return means["loss"], (means, rows)

    total: Params = None
    terms: Terms = {}
    rows: Terms = {}
    for prefix, (inputs, noise, keys) in batch.passes.items():
        index, variants = 0, [inputs]  # and those of other numbers of tokens
        if isinstance(model, MaskedModel):
            index, variants = model.bucket_inputs(inputs, batch.data.shape)
        branches = [
            partial(jax.grad(loss, has_aux=True), inputs=variant)
            for variant in variants
        ]
        grads, (means, of_rows) = jax.lax.switch(index, branches, params, noise, keys)
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        terms |= {prefix + name: term for name, term in means.items()}
        rows |= {prefix + name: term for name, term in of_rows.items()}
    return total, terms, rows


def accumulate_gradients(grad_fn: Callable, microbatches: int) -> Callable:
    """Returns grad_fn(params, batch), averaged over equal parts of the batch.

    Part j takes every n-th row from row j on, so that each device keeps its rows.

    Args:
      grad_fn: (params, batch) -> (gradient, terms, rows), where batch is a tree of
        [b, ...], and rows are terms of each image, in the batch's order.
      microbatches: how many parts; 1 returns grad_fn itself.
    """
    if microbatches == 1:
        return grad_fn

    def averaged(params: Params, batch: Any) -> tuple[Params, Terms, Terms]:
        # (b, ...) -> (n, b / n, ...)
        split = lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)
        join_rows = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

        def add(total: Any, part: Any) -> tuple[Any, Terms]:
            grads, terms, rows = grad_fn(params, part)
            return jax.tree.map(jnp.add, total, (grads, terms)), rows

        parts = jax.tree.map(split, batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(grad_fn, params, first)[:2]
        total, rows = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), parts)
        grads, terms = jax.tree.map(lambda x: x / microbatches, total)
        return grads, terms, jax.tree.map(join_rows, rows)

    return averaged


def total_loss(passes: Mapping[str, Pass], terms: Terms) -> Array:
    """Returns the sum of the passes' losses, in a dict with all their terms."""
    losses = [terms[prefix + "loss"] for prefix in passes]
    return functools.reduce(operator.add, losses)
