"""Begins a training run: with fresh weights, where it left off, or from given weights.

A run that resumes takes the very steps it would have taken. The order of the records is
one endless sequence, of which a step takes the next batch_size; a run that resumes with
batches of another size goes on in the same sequence.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from sit_jax import checkpoint
from sit_jax.config import difference, from_json
from sit_jax.convert.open import (
    CheckpointWeights,
    WeightsRef,
    load_base,
    open_weights,
    require_checkpoint,
)
from sit_jax.convert.rules import rules_for
from sit_jax.errors import UserError
from sit_jax.experiment import build_experiment
from sit_jax.files import is_remote, require_space
from sit_jax.models.dit import SiT
from sit_jax.parallel import sharding_rules
from sit_jax.parallel.mesh import replicated, with_shardings
from sit_jax.trainer.compile import ReplicaCheck
from sit_jax.training.state import (
    TrainState,
    init_ema,
    init_params,
    join_ema,
    split_ema,
)

FRESH = WeightsRef()
LABEL_TABLE = "y_embedder.embedding_table.weight"  # as torch files call it


def restore_or_init(
    experiment: Any,
    mesh: Mesh,
    seed: int,
    directory: Path,
    init: WeightsRef = FRESH,
) -> tuple[TrainState, str, dict[str, Any]]:
    """Makes the state that a run begins with.

    Args:
        experiment: What is built from the config.
        mesh: The devices.
        seed: For fresh weights.
        directory: The run's own checkpoints, of which damaged ones are passed over.
        init: Weights to take while the run has none of its own. An optimizer state in
            a checkpoint of the same network is taken too, with its step, unless
            init.weights_only; else the weights start a run at step 0.

    Returns:
        The state on the mesh; a sentence that says where it comes from; and what the
        checkpoints of the run tell besides.
    """
    if experiment.adapter is not None:
        return init_lora(experiment, mesh, seed, directory, init.path)
    key = jax.random.key(seed)
    model, decay = experiment.model, experiment.ema_decay
    make = partial(TrainState.init, model, experiment.optimizer, experiment.shape)
    make = partial(make, ema_decay=decay, timestep_sampler_state=experiment.losses)
    shapes = jax.eval_shape(make, key)
    shardings = sharding_rules.state_shardings(mesh, shapes)
    target = with_shardings(shapes, shardings)
    if checkpoint.steps(directory):
        return *_restore_newest(experiment, directory, target), {}
    if init.path is None:
        state = jax.jit(make, out_shardings=shardings)(key)
        return state, "starts with fresh weights", {}
    opened = open_weights(init.path, init.open_torch)
    other = _experiment_of(opened)
    if not init.weights_only and _is_resumable(opened, other, experiment, init.path):
        state = restore_state(
            experiment, opened.path, opened.step, target, required=("params", "ema")
        )
        if "opt_state" in checkpoint.items(opened.path, opened.step):
            return state, f"goes on from {init.path}, step {int(state.step)}", {}
        new = "optimizer and step new"
        return state, f"starts from the weights of {init.path}, {new}", {}
    load = lambda item: opened.load(item, other, mesh)
    state, news = init_from_other_model(
        experiment, other, load, key, shardings=shardings, source=init.path
    )
    return state, f"starts from the weights of {init.path}; {news}", {}


def _restore_newest(
    experiment: Any, directory: Path, target: TrainState
) -> tuple[TrainState, str]:
    required = checkpoint_items(target, experiment.ema_decay)
    state, lines = checkpoint.restore_newest(
        directory, lambda n: restore_state(experiment, directory, n, target, required)
    )
    return state, "; ".join(lines)


def _experiment_of(opened: Any) -> Any:
    """Returns what is built from opened weights' config; None if there is no config."""
    if isinstance(opened, CheckpointWeights):
        meta = checkpoint.read_meta(opened.path, opened.step)
        return build_experiment(from_json(meta["config"])) if "config" in meta else None
    return build_experiment(opened.config)


def _is_resumable(opened: Any, other: Any, experiment: Any, source: str) -> bool:
    """Returns whether these are a checkpoint's, of the network the config wants."""
    if other is not None:
        require_same_family(source, type(other.model), experiment.model)
        if other.adapter is not None:
            return False  # what is loaded is its base with the adapters merged in
    same = other is None or is_same_network(experiment, other)
    return same and isinstance(opened, CheckpointWeights)


# ---- states in checkpoints ----


def checkpoint_items(
    state: TrainState, ema_decay: float | tuple[float, ...]
) -> dict[str, Any]:
    """Returns the items of a checkpoint, by name."""
    items = {"params": state.params, **split_ema(state.ema, ema_decay)}
    items["opt_state"] = state.opt_state
    losses = state.timestep_sampler_state
    return items | ({"losses": losses} if jax.tree.leaves(losses) else {})


def checkpoint_meta(state: TrainState) -> dict[str, Any]:
    """Returns what a checkpoint's meta tells of a state."""
    return {"step": int(state.step), "skipped": state.skipped_steps.tolist()}


def restore_state(
    experiment: Any,
    directory: Path,
    step: int,
    target: TrainState,
    required: Mapping[str, Any] | tuple[str, ...],
) -> TrainState:
    """Restores the state of a saved step.

    Items that are not required may be missing: then further EMAs begin as `ema`, and
    the others anew. Without an optimizer state the step is 0.

    Args:
        experiment: What is built from the config.
        directory: The checkpoints.
        step: Which of them.
        target: A state of shapes with shardings.
        required: Names of items that must be there.
    """
    wanted = checkpoint_items(target, experiment.ema_decay)
    saved = checkpoint.items(directory, step)
    names = [name for name in wanted if name in saved or name in required]
    items = checkpoint.load(directory, step, **{name: wanted[name] for name in names})
    for name in wanted.keys() - items.keys():
        if name.startswith("ema"):
            items[name] = jax.tree.map(jnp.copy, items["ema"])  # each has its memory
            continue
        losses = lambda _: experiment.losses
        make = experiment.optimizer.init if name == "opt_state" else losses
        shardings = jax.tree.map(lambda x: x.sharding, wanted[name])
        items[name] = jax.jit(make, out_shardings=shardings)(items["params"])
    meta = checkpoint.read_meta(directory, step) if "opt_state" in saved else {}
    sharding = replicated(target.step.sharding.mesh)
    put = lambda x: jax.device_put(np.asarray(x, np.int32), sharding)
    return TrainState(
        step=put(meta.get("step", 0)),
        params=items["params"],
        ema=join_ema(items, experiment.ema_decay),
        opt_state=items["opt_state"],
        skipped_steps=put(meta.get("skipped", (0, 0))),
        timestep_sampler_state=items.get("losses", ()),
    )


@dataclasses.dataclass(frozen=True)
class CheckpointWriter:
    """Saves a run's states, and stops the run when that fails or a device is wrong.

    Args:
        checkpoints: Where the states go.
        replicas: What compares the devices' copies.
        meta: What each checkpoint tells of the run, of JSON.
        history: How far the run is in its data.
        ema_decay: The config's.
    """

    checkpoints: checkpoint.Checkpoints
    replicas: ReplicaCheck
    meta: Mapping[str, Any]
    history: "RunHistory"
    ema_decay: float | tuple[float, ...]

    def check(self, step: int, state: TrainState) -> None:
        """Raises what has gone wrong since the last step; cheap."""
        self.checkpoints.check()
        if self.replicas.is_due(step):
            self.replicas.check(step, state)

    def save(self, step: int, state: TrainState) -> float:
        """Starts to save a state, and returns the seconds until it was handed over."""
        start = time.perf_counter()
        self.replicas.check(step, state)
        meta = {**self.meta, **self.history.meta(step), **checkpoint_meta(state)}
        items = checkpoint_items(state, self.ema_decay)
        self.checkpoints.save(step, meta, **items)
        return time.perf_counter() - start


def require_checkpoint_space(directory: Path, state: TrainState) -> None:
    """Refuses a disk that not one step has room on; a bucket tells nobody."""
    if not is_remote(directory):
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        require_space(directory / "a step", size)


# ---- how a run went before ----


@dataclasses.dataclass(frozen=True)
class RunHistory:
    """How far a run is in its data, and what has changed since its last step.

    Attributes:
        batch_size: Records of a step.
        mesh: Sizes of the mesh's axes.
        skip: Records that the run has taken beyond step * batch_size.
        changes: A sentence for each setting that is not as it was.
    """

    batch_size: int
    mesh: dict[str, int]
    skip: int = 0
    changes: tuple[str, ...] = ()

    def meta(self, step: int) -> dict[str, Any]:
        """Returns what a checkpoint of that step tells of it."""
        records = self.skip + step * self.batch_size
        return {"records": records, "mesh": self.mesh}


def read_history(
    directory: Path, step: int, config: Mapping[str, Any], mesh: Mesh
) -> RunHistory:
    """Reads the history of a run that resumes from a step with a JSON config.

    A run without a checkpoint of its own begins its data at step * batch_size.
    """
    size, now = config["batch_size"], dict(mesh.shape)
    if step not in checkpoint.steps(directory):
        return RunHistory(size, now)
    meta = checkpoint.read_meta(directory, step)
    before = meta["config"]
    records = meta.get("records", step * before["batch_size"])
    changes = [
        f"{name} was {old}, is {new}"
        for name, old, new in difference(before, config)
        if not name.startswith("mesh")
    ]
    if before["batch_size"] != size:
        rate = "the learning rate is the config's, whatever the batch"
        changes.append(f"from record {records:,} on a step takes {size}; {rate}")
    then = dict.fromkeys(now, 1) | meta.get("mesh", now)  # an axis may be newer
    if then != now:
        changes.append(f"saved on {_devices(then)}, goes on on {_devices(now)}")
    return RunHistory(size, now, records - step * size, tuple(changes))


def _devices(mesh: Mapping[str, int]) -> str:
    axes = " x ".join(f"{name} {size}" for name, size in mesh.items())
    return f"{np.prod(list(mesh.values()))} devices ({axes})"


# ---- weights of another network ----


def require_same_family(source: str, other: type, model: Any) -> None:
    """Refuses weights that mean nothing to this network, whatever their shapes.

    Args:
        source: Where the weights are, for the message.
        other: The class of the network that they are of.
        model: The network that would begin with them.
    """
    if rules_for(other()) is not rules_for(model):
        raise UserError(
            f"{source} holds the weights of an {other.__name__}, but the config's "
            f"network is an {type(model).__name__}"
        )
    if issubclass(other, SiT) and not isinstance(model, SiT):
        raise UserError(
            f"{source} holds the weights of a SiT, whose variance half no gradient "
            "ever reached, and a DiT learns its variance; begin with a DiT's, or afresh"
        )


def is_same_network(one: Any, other: Any) -> bool:
    """Returns whether two experiments' networks mean the same by every tensor."""
    key = lambda e: (type(e.model), e.model.classes, e.model.null_label, e.shape)
    return key(one) == key(other)


def init_from_other_model(
    experiment: Any,
    other: Any,
    load: Callable[[str], Any],
    key: jax.Array,
    *,
    shardings: TrainState,
    source: str,
) -> tuple[TrainState, str]:
    """Begins with the weights of a network of other classes or another resolution.

    All tensors are taken as they are, but for the table of labels where the classes are
    others: it begins anew except for its null row, which guidance needs. Positions are
    no parameters of DiT and SiT.

    Args:
        experiment: Of the run.
        other: Of the weights.
        load: Loads an item of the weights, "params" or "ema".
        key: For the new table.
        shardings: Of the state.
        source: Where the weights are, for messages.

    Returns:
        The state at step 0, and what is new in it.
    """
    model, theirs = experiment.model, other.model
    require_same_family(source, type(theirs), model)
    table = next(flax for torch, flax, _ in rules_for(model) if torch == LABEL_TABLE)
    labels = lambda model: (model.classes, model.null_label)
    is_new_table = labels(model) != labels(theirs)
    shapes = _param_shapes(experiment)
    kept = {k: v for k, v in shapes.items() if not (is_new_table and k == table)}
    saved = {k: v for k, v in _param_shapes(other).items() if k in kept}
    checkpoint.require_same_shapes(source, saved, kept)

    def make(key: jax.Array, params: Any, ema: Any) -> TrainState:
        trees = [flatten_dict(tree, sep="/") for tree in (params, ema)]
        if is_new_table:
            fresh = init_params(model, experiment.shape, key)
            fresh = flatten_dict(fresh, sep="/")[table]
            for tree in trees:
                rows = fresh
                if model.null_label and theirs.null_label:
                    rows = jnp.concatenate([fresh[:-1], tree[table][-1:]])
                tree[table] = rows
        params, ema = (unflatten_dict(tree, sep="/") for tree in trees)
        state = _create_state(experiment, params)
        return state.replace(ema=init_ema(ema, experiment.ema_decay))

    state = jax.jit(make, out_shardings=shardings)(key, load("params"), load("ema"))
    news = ["optimizer and step new"]
    if is_new_table:
        null = f", null label {model.classes}" if model.null_label else ""
        news.append(
            f"of {len(shapes)} tensors only {table} {shapes[table].shape} is new, for "
            f"{model.classes} classes instead of {theirs.classes}{null}"
        )
    if experiment.shape != other.shape:
        ours, old = (" x ".join(map(str, e.shape[:2])) for e in (experiment, other))
        news.append(f"positions of {ours} instead of {old}")
    if type(model) is not type(theirs):
        news.append(
            f"{type(theirs).__name__}'s weights, which mean another output and "
            "another time: no samples before some training"
        )
    return state, "; ".join(news)


def _create_state(experiment: Any, params: Any) -> TrainState:
    decay, losses = experiment.ema_decay, experiment.losses
    return TrainState.create(
        params, experiment.optimizer, ema_decay=decay, timestep_sampler_state=losses
    )


def _param_shapes(experiment: Any) -> dict[str, jax.ShapeDtypeStruct]:
    init = partial(init_params, experiment.model, experiment.shape)
    return flatten_dict(jax.eval_shape(init, jax.random.key(0)), sep="/")


# ---- adapters ----


def init_lora(
    experiment: Any, mesh: Mesh, seed: int, directory: Path, init: str | None = None
) -> tuple[TrainState, str, dict[str, Any]]:
    """Begins a run that trains adapters: over its base, or where it left off.

    Args:
        experiment: What is built from the config.
        mesh: The devices.
        seed: For fresh adapters.
        directory: The run's own checkpoints; those of adapters say where their base is.
        init: A workdir or checkpoint of the base, or of adapters to begin with.

    Returns:
        What restore_or_init does.
    """
    own = checkpoint.steps(directory)
    adapters = _find_adapters(init)
    last = (directory, own[-1]) if own else adapters
    record = checkpoint.read_meta(*last)["base"] if last else None
    if init is None and record is None:
        raise UserError("config.adapter adapts a trained network: add --init BASE")
    path = init if init and not adapters else record["path"]
    base, record = load_base(experiment, mesh, path, record)
    base = experiment.adapter.quantize_base(base)

    def make(base: Any) -> TrainState:
        params = experiment.adapter.add_adapters(base, jax.random.key(seed))
        return _create_state(experiment, params)

    shardings = sharding_rules.state_shardings(mesh, jax.eval_shape(make, base))
    state = jax.jit(make, out_shardings=shardings, donate_argnums=0)(base)
    target, frozen = with_shardings(state, shardings), state.frozen_params
    origin = "starts anew"
    if own:
        state, origin = _restore_newest(experiment, directory, target)
    elif adapters:
        state = restore_state(experiment, *adapters, target, ("params", "ema"))
        origin = f"goes on from {init}, step {int(state.step)}"
    of_base = f"adapters of {record['path']}/{record['step']}, {record['sha256'][:12]}"
    return state.replace(frozen_params=frozen), f"{origin}, {of_base}", {"base": record}


def _find_adapters(path: str | None) -> tuple[Path, int] | None:
    """Returns directory and step of a checkpoint of adapters, None of another."""
    if path is None:
        return None
    require_checkpoint(path)
    directory, step = checkpoint.find_step(path)
    is_adapter = "base" in checkpoint.read_meta(directory, step)
    return (directory, step) if is_adapter else None
