"""Where a run that trains adapters begins: over its base, or where it left off."""

from functools import partial

import jax

from sit_jax import checkpoint
from sit_jax.convert.base import load_base, require_checkpoint
from sit_jax.errors import UserError
from sit_jax.parallel import sharding_rules
from sit_jax.parallel.mesh import with_shardings
from sit_jax.trainer.start import items_of, restored
from sit_jax.training.state import create_train_state


def begin_adapted(parts, mesh, seed, directory, given=None):
    """-> TrainState, a sentence saying where it comes from, and the base as meta.

    directory: the run's own checkpoints; given: a workdir or checkpoint of the base,
    or of adapters to begin with. Checkpoints of adapters say where their base is.
    """
    base, record = _base(parts, mesh, directory, given)
    make = partial(_state, parts, jax.random.key(seed))
    base = parts.adapter.quantize_base(base)
    where = sharding_rules.state_shardings(mesh, jax.eval_shape(make, base))
    state = jax.jit(make, out_shardings=where, donate_argnums=0)(base)
    target, frozen = with_shardings(state, where), state.frozen
    told = f"adapters of {record['path']}/{record['step']}, {record['sha256'][:12]}"
    if checkpoint.steps(directory):
        needed = items_of(target, parts.ema_decay)
        use = lambda step: restored(parts, directory, step, target, needed)
        state, lines = checkpoint.restore_newest(directory, use)
        said = "; ".join(lines)
    elif found := _adapters_at(given):
        state = restored(parts, *found, target, ("params", "ema"))
        said = f"goes on from {given}, step {int(state.step)}"
    else:
        said = "starts anew"
    return state.replace(frozen=frozen), f"{said}, {told}", {"base": record}


def _state(parts, key, base):
    adapted = parts.adapter.add_adapters(base, key)
    return create_train_state(parts.optimizer, adapted, parts.ema_decay, parts.losses)


def _base(parts, mesh, directory, given):
    """-> the weights below, and their record, which must be that of the adapters."""
    own = checkpoint.steps(directory)
    found = (directory, own[-1]) if own else _adapters_at(given)
    record = checkpoint.read_meta(*found)["base"] if found else None
    if given is None and record is None:
        raise UserError("config.adapter adapts a trained network: add --init BASE")
    elsewhere = given if given and not _adapters_at(given) else None
    return load_base(parts, mesh, elsewhere or record["path"], record)


def _adapters_at(path):
    """-> (directory, step) of a checkpoint of adapters, else None."""
    if path is None:
        return None
    require_checkpoint(path)
    found = checkpoint.find_step(path)
    return found if "base" in checkpoint.read_meta(*found) else None
