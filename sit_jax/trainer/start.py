"""Where a run begins: with fresh weights, where it left off, or with given ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from sit_jax import checkpoint
from sit_jax.config import from_json
from sit_jax.convert.weights import Directory, open_weights
from sit_jax.experiment import build_experiment
from sit_jax.files import is_remote, require_space
from sit_jax.parallel import sharding_rules
from sit_jax.parallel.mesh import replicated, with_shardings
from sit_jax.trainer.transfer import require_kind, same_network, transferred
from sit_jax.training.state import TrainState, init_state, join_ema, split_ema


def begin(
    parts, mesh, seed, directory, given=None, weights_only=False, torch_file=None
):
    """-> TrainState on the mesh, and a sentence saying where it comes from.

    directory: the run's own checkpoints, of which damaged ones are passed over; given:
    what to take weights from while the run has none of its own, as sample.py's
    --weights (torch_file: see open_weights). An optimizer state found in a checkpoint
    of the same network is taken too, with its step, unless weights_only; else the
    weights start a run at step 0.
    """
    model, tx, decay = parts.model, parts.optimizer, parts.ema_decay
    init = partial(init_state, model, tx, parts.shape, decay=decay, losses=parts.losses)
    key = jax.random.key(seed)
    shapes = jax.eval_shape(init, key)
    where = sharding_rules.state_shardings(mesh, shapes)
    target = with_shardings(shapes, where)
    if checkpoint.steps(directory):
        needed = items_of(target, decay)
        use = lambda step: restored(parts, directory, step, target, needed)
        state, lines = checkpoint.restore_newest(directory, use)
        return state, "; ".join(lines)
    if given is None:
        return jax.jit(init, out_shardings=where)(key), "starts with fresh weights"
    opened = open_weights(given, torch_file)
    theirs = _theirs(opened)
    if not weights_only and _same(opened, theirs, parts, given):
        held = (opened.path, opened.step)
        state = restored(parts, *held, target, ("params", "ema"))
        if "opt_state" in checkpoint.items(*held):
            return state, f"goes on from {given}, step {int(state.step)}"
        return state, f"starts from the weights of {given}, optimizer and step new"
    load = lambda item: opened.load(item, theirs, mesh)
    state, told = transferred(parts, theirs, load, key, where, given)
    return state, f"starts from the weights of {given}; {told}"


def pack(state, decay):
    """TrainState -> the items of a checkpoint, and its part of the meta."""
    meta = {"step": int(state.step), "skipped": state.skipped.tolist()}
    return items_of(state, decay), meta


def items_of(state, decay):
    items = {"params": state.params, **split_ema(state.ema, decay)}
    items["opt_state"] = state.opt_state
    return items | ({"losses": state.losses} if jax.tree.leaves(state.losses) else {})


def require_room(directory, state):
    """Refuses a disk on which not one step has room; a bucket tells nobody."""
    if not is_remote(directory):
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        require_space(directory / "a step", size)


def restored(parts, directory, step, target, needed):
    """-> the TrainState of a saved step, placed as target says.

    Items that are not needed may lack: then averages begin as `ema`, the others anew.
    Without an optimizer state the step is 0.
    """
    wanted = items_of(target, parts.ema_decay)
    held = checkpoint.items(directory, step)
    asked = {name: wanted[name] for name in wanted if name in held or name in needed}
    found = checkpoint.load(directory, step, **asked)
    for name in wanted.keys() - found.keys():
        if name.startswith("ema"):
            found[name] = jax.tree.map(jnp.copy, found["ema"])  # each has its memory
            continue
        fresh = parts.optimizer.init if name == "opt_state" else lambda _: parts.losses
        where = jax.tree.map(lambda x: x.sharding, wanted[name])
        found[name] = jax.jit(fresh, out_shardings=where)(found["params"])
    meta = checkpoint.read_meta(directory, step) if "opt_state" in held else {}
    place = replicated(target.step.sharding.mesh)
    put = lambda x: jax.device_put(np.asarray(x, np.int32), place)
    return TrainState(
        step=put(meta.get("step", 0)),
        params=found["params"],
        ema=join_ema(found, parts.ema_decay),
        opt_state=found["opt_state"],
        skipped=put(meta.get("skipped", (0, 0))),
        losses=found.get("losses", ()),
    )


def _theirs(opened):
    """The recipe of opened weights; None of a checkpoint that does not tell."""
    if isinstance(opened, Directory):
        meta = checkpoint.read_meta(opened.path, opened.step)
        return build_experiment(from_json(meta["config"])) if "config" in meta else None
    return build_experiment(opened.config)


def _same(opened, theirs, parts, given):
    """Whether these are a checkpoint's, of the network that the config wants."""
    if theirs is not None:
        require_kind(given, type(theirs.model), parts.model)
    if theirs is not None and theirs.adapter is not None:
        return False  # what is loaded is its base with the adapters merged in
    same = theirs is None or same_network(parts, theirs)
    return same and isinstance(opened, Directory)
