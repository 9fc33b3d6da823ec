"""Moving averages of the weights: one, or several at different rates.

With one rate the average is a tree like the weights; with a tuple of rates a dict of
such trees by the rates' names, "0.9999". In a checkpoint the first is the item `ema`,
which is sampled from, the others are `ema_0.999` and so on.
"""

import jax
import jax.numpy as jnp
import optax

from sit_jax.errors import UserError


def check(decay):
    """Refuses rates outside 0..1, none at all, and one twice."""
    for rate in _rates(decay):
        if not 0 <= rate <= 1:
            raise UserError(f"ema_decay is {rate}; it must be in [0, 1]")
    if len(set(_names(decay))) != len(_rates(decay)) or not _rates(decay):
        raise UserError(f"ema_decay is {decay}; give one rate, or several different")


def begin(params, decay):
    """Copies of the weights, in memory of their own: the state is donated."""
    copy = lambda: jax.tree.map(jnp.copy, params)
    if not isinstance(decay, tuple):
        return copy()
    return {name: copy() for name in _names(decay)}


def update(ema, params, decay):
    """The averages one step later."""
    if not isinstance(decay, tuple):
        return optax.incremental_update(params, ema, 1 - decay)
    pairs = zip(_names(decay), decay, strict=True)
    return {name: update(ema[name], params, rate) for name, rate in pairs}


def first(ema, decay):
    """The one that is sampled from."""
    return ema[_names(decay)[0]] if isinstance(decay, tuple) else ema


def split(ema, decay):
    """-> {item of a checkpoint: tree}"""
    if not isinstance(decay, tuple):
        return {"ema": ema}
    items = item_names(decay)
    return {item: ema[name] for item, name in zip(items, _names(decay), strict=True)}


def join(items, decay):
    """The other way round; items may hold more."""
    if not isinstance(decay, tuple):
        return items["ema"]
    names = zip(item_names(decay), _names(decay), strict=True)
    return {name: items[item] for item, name in names}


def item_names(decay):
    """The items of a checkpoint, the one that is sampled from first."""
    return ("ema", *(f"ema_{name}" for name in _names(decay)[1:]))


def _names(decay):
    return tuple(str(float(rate)) for rate in _rates(decay))


def _rates(decay):
    return decay if isinstance(decay, tuple) else (decay,)
