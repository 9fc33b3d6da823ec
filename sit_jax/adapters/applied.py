"""A network applied to weights in any form that stored.py knows.

Networks are written for plain arrays. Where a layer finds another form in an array's
place, its product is taken here instead: inside the scan over the blocks, so that an
int8 weight becomes floats one layer at a time, and an adapter's gradient never passes
through one for the whole weight.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from sit_jax.adapters.stored import Adapted, Grown, is_stored, over, rows
from sit_jax.models.layers import Dense
from sit_jax.models.products import product


def apply(model, params, *inputs, **more):
    """model.apply on params; inputs as the model takes them."""
    if not any(map(is_stored, jax.tree.leaves(params, is_leaf=is_stored))):
        return model.apply({"params": params}, *inputs, **more)
    params = jax.tree.map(_at_full_size, params, is_leaf=is_stored)
    with nn.intercept_methods(_layer):
        return model.apply({"params": params}, *inputs, **more)


def trained(model, params, *inputs, **more):
    """As apply, but without forward-mode derivatives: see products.py."""
    with nn.intercept_methods(_backward):
        return apply(model, params, *inputs, **more)


def _backward(call, inputs, more, context):
    if context.method_name == "times" and isinstance(context.module, Dense):
        return product(*inputs)
    return call(*inputs, **more)


def _at_full_size(node):
    """Tables with new rows in one piece, for flax looks at a weight's shape."""
    if isinstance(node, Adapted):
        return node.replace(base=_at_full_size(node.base))
    return node.read() if isinstance(node, Grown) else node


def _layer(call, inputs, more, context):
    """What flax runs in place of a layer's method, if its weight is stored so."""
    layer = context.module
    if context.method_name == "__call__" and isinstance(layer, nn.Dense):
        weight = layer.get_variable("params", "kernel")
        if is_stored(weight):
            dtype = layer.dtype or jnp.float32
            out = weight.product(inputs[0], dtype)
            out = out + over(layer.get_variable("params", "bias").astype(dtype), out)
            if heads := getattr(layer, "heads", None):
                return rearrange(out, "b t (n h d) -> n h b d t", n=3, h=heads)
            return out
    if context.method_name == "__call__" and isinstance(layer, nn.Embed):
        table = layer.get_variable("params", "embedding")
        if is_stored(table):
            return rows(table, inputs[0])
    return call(*inputs, **more)
