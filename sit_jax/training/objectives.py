"""What a training step asks of the network: one pass, or with MDT a masked one too.

An objective is a function (model, keys, labels, shape, label_dropout) that returns
{prefix: Pass}. The loss is the sum of all passes' losses; a prefix begins the names of
a pass's metrics. It returns passes and not a loss, so that value_and_grad can
differentiate them one after the other: only one pass's activations are in memory, and
of a pass that is compiled for several numbers of tokens only one program runs.
"""

import functools
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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


class Pass(NamedTuple):
    """One forward and backward pass through the network."""

    inputs: Mapping[str, Array]  # of the network beside x and t: labels "y", masks
    noise: Batch
    dropout_keys: Keys


Objective = Callable[[Any, StepKeys, Labels, tuple[int, ...], float], dict[str, Pass]]
Terms = dict[str, Array]


def objective_for(model: Any) -> Objective:
    """Returns masked_objective for a network that hides tokens, else the plain one."""
    return masked_objective if isinstance(model, MaskedModel) else plain_objective


def plain_objective(
    model: Any,
    keys: StepKeys,
    labels: Labels,
    shape: tuple[int, ...],
    label_dropout: float,
) -> dict[str, Pass]:
    """Returns the one pass of SiT and DiT.

    Args:
      model: a network; `classes` is its null label.
      keys: of the step.
      labels: [b], of which a share is replaced by the null label.
      shape: of the batch, (b, h, w, c).
      label_dropout: that share.
    """
    labels = drop_labels(keys.labels, labels, model.classes, label_dropout)
    noise = jax.random.normal(keys.noise, shape)
    return {"": Pass({"y": labels}, noise, jax.random.split(keys.dropout, shape[0]))}


def masked_objective(
    model: Any,
    keys: StepKeys,
    labels: Labels,
    shape: tuple[int, ...],
    label_dropout: float,
) -> dict[str, Pass]:
    """Returns the plain pass, and those in which the model hides tokens.

    They are at the same times, but with other noise and other dropped labels.

    Source: Gao et al., arXiv:2303.14389 (MDT), section 3.3.
    """
    passes = plain_objective(model, keys, labels, shape, label_dropout)
    dropout_keys = passes[""].dropout_keys
    masks = model.passes(keys.mask, shape)
    masked = {prefix: inputs for prefix, inputs in masks.items() if prefix}
    for i, (prefix, inputs) in enumerate(masked.items()):
        label_key, noise_key = (
            jax.random.fold_in(k, i) for k in (keys.labels, keys.noise)
        )
        kept = drop_labels(label_key, labels, model.classes, label_dropout)
        dropout_keys = jax.vmap(partial(jax.random.fold_in, data=i))(dropout_keys)
        noise = jax.random.normal(noise_key, shape)
        passes[prefix] = Pass({"y": kept, **inputs}, noise, dropout_keys)
    return passes


def value_and_grad(
    model: Any,
    process: Process,
    frozen_params: Params,
    params: Params,
    data: Batch,
    t: Time,
    weights: PerImage | None,
    passes: Mapping[str, Pass],
) -> tuple[Params, Terms, dict[str, PerImage]]:
    """Returns the gradient of the sum of all passes' losses, and their terms.

    Args:
      model: the network.
      process: whose losses these are.
      frozen_params: weights that are not trained; {} for none.
      params: weights that are.
      data: what the codec makes of the batch.
      t: times.
      weights: multiply the losses [b]; None for none.
      passes: from an objective.

    Returns:
      The gradient, means over the batch of weighted terms by name, and terms of each
      image without the weights.
    """

    def loss(
        params: Params, noise: Batch, keys: Keys, inputs: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], tuple[Terms, Terms]]:
        all_params = with_dropout_keys(join(params, frozen_params), keys)
        net = partial(apply_model_for_training, model, all_params, **inputs)
        rows = process.losses(net, data, noise, t)
        scaled = rows
        if weights is not None:
            scaled = jax.tree.map(lambda term: weights * term, rows)
        means = jax.tree.map(jnp.mean, scaled)
        return means["loss"], (means, rows)

    total: Params = None
    terms: Terms = {}
    rows: Terms = {}
    for prefix, (inputs, noise, keys) in passes.items():
        index, variants = _variants(model, inputs, data.shape)
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
    """Returns grad_fn(params, *batch), averaged over equal parts of the batch.

    Part j takes every n-th row from row j on, so that each device keeps its rows.

    Args:
      grad_fn: (params, *batch) -> (gradient, terms, rows), where rows are terms of
        each image, which are put back into the batch's order.
      microbatches: how many parts; 1 returns grad_fn itself.
    """
    if microbatches == 1:
        return grad_fn

    def averaged(params: Params, *batch: Any) -> tuple[Params, Terms, Terms]:
        # (b, ...) -> (n, b / n, ...)
        split = lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1)
        join_rows = lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

        def add(total: Any, part: Any) -> tuple[Any, Terms]:
            grads, terms, rows = grad_fn(params, *part)
            return jax.tree.map(jnp.add, total, (grads, terms)), rows

        parts = jax.tree.map(split, batch)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(grad_fn, params, *first)[:2]
        total, rows = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), parts)
        grads, terms = jax.tree.map(lambda x: x / microbatches, total)
        return grads, terms, jax.tree.map(join_rows, rows)

    return averaged


def total_loss(passes: Mapping[str, Pass], terms: Mapping[str, Array]) -> Array:
    """Returns the sum of the passes' losses, in a dict with all their terms."""
    losses = [terms[prefix + "loss"] for prefix in passes]
    return functools.reduce(operator.add, losses)


def _variants(
    model: Any, inputs: Mapping[str, Any], shape: tuple[int, ...]
) -> tuple[int | Int[Array, ""], list[Mapping[str, Any]]]:
    """Returns which variant of a pass to run, and the inputs of all that compile."""
    return (
        model.ways(inputs, shape) if isinstance(model, MaskedModel) else (0, [inputs])
    )
