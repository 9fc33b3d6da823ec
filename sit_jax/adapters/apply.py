"""A network applied to parameters of which some are a WeightLeaf.

Networks are written for plain arrays. Where a layer finds another form in an array's
place, its product is taken here instead: inside the scan over the blocks, so that an
int8 weight becomes floats one layer at a time, and an adapter's gradient never passes
through one for the whole weight.
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array

from sit_jax.adapters.weights import (
    ExtraRows,
    LoRAWeight,
    align_channels,
    is_weight_leaf,
    select_rows,
)
from sit_jax.models.attention_cpu import training_product
from sit_jax.models.layers import Dense


def apply_model(model: nn.Module, params: dict, *inputs: Any, **options: Any) -> Array:
    """Returns model.apply on params; inputs and options are the model's."""
    if not any(map(is_weight_leaf, jax.tree.leaves(params, is_leaf=is_weight_leaf))):
        return cast(Array, model.apply({"params": params}, *inputs, **options))
    params = jax.tree.map(_read_extra_rows, params, is_leaf=is_weight_leaf)
    with nn.intercept_methods(_intercept_weight_leaf):
        return cast(Array, model.apply({"params": params}, *inputs, **options))


def apply_model_for_training(
    model: nn.Module, params: dict, *inputs: Any, **options: Any
) -> Array:
    """Returns what apply_model does, by products whose backward pass suits a CPU.

    It has no forward-mode derivative.
    """
    with nn.intercept_methods(_intercept_product):
        return apply_model(model, params, *inputs, **options)


def _intercept_product(call, inputs, options, context):
    if context.method_name == "product" and isinstance(context.module, Dense):
        return training_product(*inputs)
    return call(*inputs, **options)


def _read_extra_rows(node):
    """Tables with new rows in one piece, since flax compares a weight's shape."""
    if isinstance(node, LoRAWeight):
        return node.replace(base=_read_extra_rows(node.base))
    return node.read() if isinstance(node, ExtraRows) else node


def _intercept_weight_leaf(call, inputs, options, context):
    """Runs in place of a layer's method; differs where its weight is a WeightLeaf."""
    layer = context.module
    if context.method_name == "__call__" and isinstance(layer, nn.Dense):
        weight = layer.get_variable("params", "kernel")
        if is_weight_leaf(weight):
            dtype = layer.dtype or jnp.float32
            out = weight.product(inputs[0], dtype)
            bias = layer.get_variable("params", "bias").astype(dtype)
            out = out + align_channels(bias, out)
            if isinstance(layer, Dense) and layer.heads:
                return rearrange(out, "b t (n h d) -> n h b d t", n=3, h=layer.heads)
            return out
    if context.method_name == "__call__" and isinstance(layer, nn.Embed):
        table = layer.get_variable("params", "embedding")
        if is_weight_leaf(table):
            return select_rows(table, inputs[0])
    return call(*inputs, **options)
