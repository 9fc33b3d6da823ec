"""Weights of one network as the beginning of another: other classes, another size.

All tensors are taken as they are but the table of labels, which is begun anew where the
classes are others; its null row stays, which the unconditional half of guidance needs.
Positions are no parameters of DiT and SiT: the table of another size is computed.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from sit_jax.checkpoint import require_same_shapes
from sit_jax.convert.rules import rules_for
from sit_jax.errors import UserError
from sit_jax.models.dit import SiT
from sit_jax.training.state import create_train_state, init_ema, init_params

LABELS = "y_embedder.embedding_table.weight"  # as torch files call it
ITEMS = ("params", "ema")


def require_kind(given, theirs, model):
    """Refuses weights that mean nothing to this network, whatever their shapes.

    theirs: the class of the network that they are of.
    """
    if rules_for(theirs()) is not rules_for(model):
        raise UserError(
            f"{given} holds the weights of an {theirs.__name__}, but the config's "
            f"network is an {type(model).__name__}"
        )
    if issubclass(theirs, SiT) and not isinstance(model, SiT):
        raise UserError(
            f"{given} holds the weights of a SiT, whose variance half no gradient ever "
            "reached, and a DiT learns its variance; begin with a DiT's, or afresh"
        )


def same_network(ours, theirs):
    """Whether two recipes' networks mean the same by every tensor."""
    told = lambda parts: (type(parts.model), *_labels(parts.model), parts.shape)
    return told(ours) == told(theirs)


def transferred(parts, theirs, load, key, where, given):
    """-> TrainState at step 0, with weights of another network, and what is new in it.

    parts, theirs: recipes; load: item -> params of theirs; where: the state's
    shardings. Tensors that neither fit nor can be begun anew are refused, in a list.
    """
    require_kind(given, type(theirs.model), parts.model)
    path, wanted = _table(parts.model), _shapes(parts)
    anew = _labels(parts.model) != _labels(theirs.model)
    kept = {name: leaf for name, leaf in wanted.items() if not (anew and name == path)}
    have = {name: leaf for name, leaf in _shapes(theirs).items() if name in kept}
    require_same_shapes(given, have, kept)

    def begun(key, params, ema):
        old = {
            "params": flatten_dict(params, sep="/"),
            "ema": flatten_dict(ema, sep="/"),
        }
        if anew:
            fresh = flatten_dict(init_params(parts.model, parts.shape, key), sep="/")
            for flat in old.values():
                flat[path] = _with_null(parts, theirs, fresh[path], flat[path])
        new = {item: unflatten_dict(flat, sep="/") for item, flat in old.items()}
        state = create_train_state(
            parts.optimizer, new["params"], parts.ema_decay, parts.losses
        )
        return state.replace(ema=init_ema(new["ema"], parts.ema_decay))

    state = jax.jit(begun, out_shardings=where)(key, *map(load, ITEMS))
    return state, _words(parts, theirs, path if anew else None, wanted)


def _with_null(parts, theirs, fresh, old):
    if not (parts.model.null_label and theirs.model.null_label):
        return fresh
    return jnp.concatenate([fresh[:-1], old[-1:]])


def _labels(model):
    return model.classes, model.null_label


def _table(model):
    """Path of the label table."""
    return next(path for torch, path, _ in rules_for(model) if torch == LABELS)


def _shapes(parts):
    init = partial(init_params, parts.model, parts.shape)
    return flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep="/")


def _words(parts, theirs, path, shapes):
    """What is not as in the weights, for the log."""
    said = ["optimizer and step new"]
    if path:
        null = f", null label {parts.model.classes}" if parts.model.null_label else ""
        said.append(
            f"of {len(shapes)} tensors only {path} {shapes[path].shape} is new, for "
            f"{parts.model.classes} classes instead of {theirs.model.classes}{null}"
        )
    if parts.shape != theirs.shape:
        sides = (" x ".join(map(str, each.shape[:2])) for each in (parts, theirs))
        said.append("positions of {} instead of {}".format(*sides))
    if type(parts.model) is not type(theirs.model):
        said.append(
            f"{type(theirs.model).__name__}'s weights, which mean another output and "
            "another time: no samples before some training"
        )
    return "; ".join(said)
