"""Moving averages of the weights: one, or several at different rates.

With one rate the average is a tree like the weights; with a tuple of rates a dict of
such trees by the rates' names, "0.9999". In a checkpoint the first is the item `ema`,
which is sampled from, the others are `ema_0.999` and so on.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from sit_jax.adapters.weights import split_trainable
from sit_jax.errors import UserError


def check_ema_decay(decay):
    """Refuses rates outside 0..1, none at all, and one twice."""
    for rate in _rates(decay):
        if not 0 <= rate <= 1:
            raise UserError(f"ema_decay is {rate}; it must be in [0, 1]")
    if len(set(_names(decay))) != len(_rates(decay)) or not _rates(decay):
        raise UserError(f"ema_decay is {decay}; give one rate, or several different")


def init_ema(params, decay):
    """Copies of the weights, in memory of their own: the state is donated."""
    copy = lambda: jax.tree.map(jnp.copy, params)
    if not isinstance(decay, tuple):
        return copy()
    return {name: copy() for name in _names(decay)}


def update_ema(ema, params, decay):
    """The averages one step later."""
    if not isinstance(decay, tuple):
        return optax.incremental_update(params, ema, 1 - decay)
    pairs = zip(_names(decay), decay, strict=True)
    return {name: update_ema(ema[name], params, rate) for name, rate in pairs}


def sampled_ema(ema, decay):
    """The one that is sampled from."""
    return ema[_names(decay)[0]] if isinstance(decay, tuple) else ema


def split_ema(ema, decay):
    """-> {item of a checkpoint: tree}"""
    if not isinstance(decay, tuple):
        return {"ema": ema}
    items = ema_item_names(decay)
    return {item: ema[name] for item, name in zip(items, _names(decay), strict=True)}


def join_ema(items, decay):
    """The other way round; items may hold more."""
    if not isinstance(decay, tuple):
        return items["ema"]
    names = zip(ema_item_names(decay), _names(decay), strict=True)
    return {name: items[item] for item, name in names}


def ema_item_names(decay):
    """The items of a checkpoint, the one that is sampled from first."""
    return ("ema", *(f"ema_{name}" for name in _names(decay)[1:]))


def _names(decay):
    return tuple(str(float(rate)) for rate in _rates(decay))


def _rates(decay):
    return decay if isinstance(decay, tuple) else (decay,)


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
    return create_train_state(tx, init_params(model, shape, key), decay, losses)


def create_train_state(tx, params, decay=0.9999, losses=()):
    """TrainState of step 0 around given parameters, of which adapters may be part."""
    zero, skipped = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.int32)
    params, frozen = split_trainable(params)
    ema = init_ema(params, decay)
    return TrainState(zero, params, ema, tx.init(params), skipped, losses, frozen)
