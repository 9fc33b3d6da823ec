"""Adam's or Adan's moments inside an optax state, whatever is chained around it."""

import jax
import optax

from sit_jax.errors import UserError
from sit_jax.training.optimizers import AdanState

FIELDS = {  # torch's names, in its order -> ours
    optax.ScaleByAdamState: {"exp_avg": "mu", "exp_avg_sq": "nu"},
    AdanState: {
        "exp_avg": "mean",
        "exp_avg_sq": "square",
        "exp_avg_diff": "change",
        "neg_pre_grad": "negative",
    },
}
COUNTED = (*FIELDS, optax.ScaleByScheduleState)


def names(tx, params):
    """-> torch's names of the moments that tx keeps."""
    state = jax.eval_shape(tx.init, params)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, tuple(FIELDS)))
    kept = [FIELDS[type(node)] for node in nodes if type(node) in FIELDS]
    return tuple(kept[0]) if kept else ()


def place(tx, params, count, *moments):
    """-> the state of tx with these moments; count also is its schedule's step.

    They are trees, in the order of names(). An optimizer that keeps anything else
    cannot be continued from them.
    """
    state = jax.eval_shape(tx.init, params)
    found = []

    def fill(node):
        if fields := FIELDS.get(type(node)):
            found.append(node)
            trees = dict(zip(fields.values(), moments, strict=True))
            return node._replace(count=count, **trees)
        if isinstance(node, optax.ScaleByScheduleState):
            return node._replace(count=count)
        raise UserError("config.optimizer keeps more than Adam's moments")

    filled = jax.tree.map(fill, state, is_leaf=lambda node: isinstance(node, COUNTED))
    if len(found) != 1:
        raise UserError(f"config.optimizer has {len(found)} parts with Adam's moments")
    return filled
