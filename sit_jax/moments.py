"""Adam's moments inside an optax state, whatever is chained around it."""

import jax
import optax

from sit_jax.errors import UserError

COUNTED = (optax.ScaleByAdamState, optax.ScaleByScheduleState)


def place(tx, params, count, mu, nu):
    """-> the state of tx with these moments; count also is its schedule's step.

    An optimizer that keeps anything else cannot be continued from Adam's moments.
    """
    state = jax.eval_shape(tx.init, params)
    found = []

    def fill(node):
        if isinstance(node, optax.ScaleByAdamState):
            found.append(node)
            return node._replace(count=count, mu=mu, nu=nu)
        if isinstance(node, optax.ScaleByScheduleState):
            return node._replace(count=count)
        raise UserError("config.optimizer keeps more than Adam's moments")

    filled = jax.tree.map(fill, state, is_leaf=lambda node: isinstance(node, COUNTED))
    if len(found) != 1:
        raise UserError(f"config.optimizer has {len(found)} parts with Adam's moments")
    return filled
