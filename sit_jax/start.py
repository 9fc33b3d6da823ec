"""Where a run begins: with fresh weights, where it left off, or with given ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax import averages, checkpoint
from sit_jax.config import from_json
from sit_jax.errors import UserError
from sit_jax.models.kinds import kind_of
from sit_jax.sharding import everywhere, shaped, split_weights
from sit_jax.training import TrainState, init_state


def begin(parts, mesh, seed, directory, given=None):
    """-> TrainState on the mesh, and a sentence saying where it comes from.

    directory: the run's own checkpoints; given: a workdir or checkpoint directory to
    take weights from while the run has none of its own. An optimizer state found there
    is taken too, with its step; without one the weights start a run at step 0.
    """
    model, tx, decay = parts.model, parts.tx, parts.ema_decay
    init = partial(init_state, model, tx, parts.shape, decay=decay, losses=parts.losses)
    key = jax.random.key(seed)
    shapes = jax.eval_shape(init, key)
    where = split_weights(mesh, shapes)
    target = shaped(shapes, where)
    if own := checkpoint.steps(directory):
        state = _restored(parts, directory, own[-1], target, _items(target, decay))
        return state, f"goes on from step {own[-1]}"
    if given is None:
        return jax.jit(init, out_shardings=where)(key), "starts with fresh weights"
    directory, step = checkpoint.find(given)
    _require_kind(given, directory, step, model)
    state = _restored(parts, directory, step, target, ("params", "ema"))
    if "opt_state" in checkpoint.items(directory, step):
        return state, f"goes on from {given}, step {int(state.step)}"
    return state, f"starts from the weights of {given}, optimizer and step new"


def pack(state, decay):
    """TrainState -> the items of a checkpoint, and its part of the meta."""
    meta = {"step": int(state.step), "skipped": state.skipped.tolist()}
    return _items(state, decay), meta


def _items(state, decay):
    items = {"params": state.params, **averages.split(state.ema, decay)}
    items["opt_state"] = state.opt_state
    return items | ({"losses": state.losses} if jax.tree.leaves(state.losses) else {})


def _restored(parts, directory, step, target, needed):
    """-> the TrainState of a saved step, placed as target says.

    Items that are not needed may lack: then averages begin as `ema`, the others anew.
    Without an optimizer state the step is 0.
    """
    wanted = _items(target, parts.ema_decay)
    held = checkpoint.items(directory, step)
    asked = {name: wanted[name] for name in wanted if name in held or name in needed}
    found = checkpoint.load(directory, step, **asked)
    for name in wanted.keys() - found.keys():
        if name.startswith("ema"):
            found[name] = jax.tree.map(jnp.copy, found["ema"])  # each has its memory
            continue
        fresh = parts.tx.init if name == "opt_state" else lambda _: parts.losses
        where = jax.tree.map(lambda x: x.sharding, wanted[name])
        found[name] = jax.jit(fresh, out_shardings=where)(found["params"])
    meta = checkpoint.read_meta(directory, step) if "opt_state" in held else {}
    place = everywhere(target.step.sharding.mesh)
    put = lambda x: jax.device_put(np.asarray(x, np.int32), place)
    return TrainState(
        step=put(meta.get("step", 0)),
        params=found["params"],
        ema=averages.join(found, parts.ema_decay),
        opt_state=found["opt_state"],
        skipped=put(meta.get("skipped", (0, 0))),
        losses=found.get("losses", ()),
    )


def _require_kind(given, directory, step, model):
    """Refuses weights of a network of another family, whatever their shapes."""
    meta = checkpoint.read_meta(directory, step)
    if "config" not in meta:
        return
    theirs = from_json(meta["config"]).model.make
    if kind_of(theirs).rules is not kind_of(type(model)).rules:
        raise UserError(
            f"{given} holds the weights of an {theirs.__name__}, but the config's "
            f"network is an {type(model).__name__}"
        )
