"""What the forward pass keeps for the backward pass, counted without running either."""

import math

import jax
import jax.numpy as jnp
from jax.extend.core import Var


def saved_bytes(model, shape, images):
    """-> bytes kept for a batch of so many images [H, W, C], of all passes of a step.

    These are the residuals of differentiating the network by its weights, under its
    remat policy; of MDT's hidden passes as many tokens as can ever be seen. What a
    block needs while it is differentiated, and what the compiler adds, comes on top.
    """
    x = jax.ShapeDtypeStruct((images, *shape), jnp.float32)
    t = jax.ShapeDtypeStruct((images,), jnp.float32)
    y = jax.ShapeDtypeStruct((images,), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), x, t, y)["params"]

    def residuals(params, x, t, y, key):
        def passes(params):
            apply = lambda told: model.apply({"params": params}, x, t, y, **told)
            return [apply(told) for told in _passes(model, key, x.shape).values()]

        return jax.vjp(passes, params)[1]

    key = jax.eval_shape(lambda: jax.random.key(0))
    traced = jax.make_jaxpr(residuals)(params, x, t, y, key).jaxpr
    # what comes in is held anyway, and what is kept twice is one array
    given = set(traced.invars)
    kept = {v for v in traced.outvars if isinstance(v, Var) and v not in given}
    return sum(_bytes(v.aval) for v in kept)


def _passes(model, key, shape):
    return model.passes(key, shape) if hasattr(model, "passes") else {"": {}}


def _bytes(aval):
    return math.prod(aval.shape) * aval.dtype.itemsize
