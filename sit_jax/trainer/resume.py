"""Begins a training run: with fresh weights, where it left off, or from given weights.

A run that resumes takes the very steps it would have taken. The order of the records is
one endless sequence, of which a step takes the next batch_size; a run that resumes with
batches of another size goes on in the same sequence.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from sit_jax import checkpoint
from sit_jax.config import difference
from sit_jax.convert.open import (
    CheckpointWeights,
    LoadedWeights,
    WeightsRef,
    base_shapes,
    load_base,
    require_checkpoint,
)
from sit_jax.convert.rules import rules_for
from sit_jax.errors import UserError
from sit_jax.experiment import Experiment, build_experiment
from sit_jax.files import is_remote, require_space
from sit_jax.models.dit import SiT
from sit_jax.parallel import sharding_rules
from sit_jax.parallel.mesh import replicated, with_shardings
from sit_jax.planning.programs import create_state, eval_state_shapes
from sit_jax.trainer.compile import ReplicaCheck
from sit_jax.training.state import TrainState, init_ema, init_params

FRESH = WeightsRef()
LABEL_TABLE = "y_embedder.embedding_table.weight"  # as torch files call it


class Beginning(NamedTuple):
    """What a run begins with."""

    state: TrainState  # on the mesh
    origin: str  # a sentence that says where it comes from
    meta: Mapping[str, Any] = {}  # what checkpoints of the run tell besides


def restore_or_init(
    experiment: Experiment,
    mesh: Mesh,
    seed: int,
    directory: Path,
    init: WeightsRef = FRESH,
) -> Beginning:
    """Makes the state that a run begins with.

    Args:
        experiment: What is built from the config.
        mesh: The devices.
        seed: For fresh weights.
        directory: The run's own checkpoints, of which damaged ones are passed over.
        init: Weights to take while the run has none of its own. An optimizer state in
            a checkpoint of the same network is taken too, with its step, unless
            init.weights_only; else the weights start a run at step 0.
    """
    if experiment.adapter is not None:
        return init_lora(experiment, mesh, seed, directory, init.path)
    shapes, shardings = eval_state_shapes(experiment, mesh)
    target = with_shardings(shapes, shardings)
    if checkpoint.steps(directory):
        return _restore_newest(experiment, directory, target)
    key = jax.random.key(seed)
    if init.path is not None:
        return _init_from_weights(experiment, target, key, init)

    def make(key: jax.Array) -> TrainState:
        params = init_params(experiment.model, experiment.shape, key)
        return create_state(experiment, params)

    state = jax.jit(make, out_shardings=shardings)(key)
    return Beginning(state, "starts with fresh weights")


def _restore_newest(
    experiment: Experiment, directory: Path, target: TrainState
) -> Beginning:
    required = checkpoint_items(target)
    state, lines = checkpoint.restore_newest(
        directory, lambda n: restore_state(experiment, directory, n, target, required)
    )
    return Beginning(state, "; ".join(lines))


# ---- states in checkpoints ----


def checkpoint_items(state: TrainState) -> dict[str, Any]:
    """Returns the items of a checkpoint, by name."""
    items = {"params": state.params, **state.ema, "opt_state": state.opt_state}
    losses = state.timestep_sampler_state
    return items | ({"losses": losses} if jax.tree.leaves(losses) else {})


def checkpoint_meta(state: TrainState) -> dict[str, Any]:
    """Returns what a checkpoint's meta tells of a state."""
    return {"step": int(state.step), "skipped": state.skipped_steps.tolist()}


def restore_state(
    experiment: Experiment,
    directory: Path,
    step: int,
    target: TrainState,
    required: Collection[str],
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
    wanted, saved = checkpoint_items(target), checkpoint.items(directory, step)
    names = [name for name in wanted if name in saved or name in required]
    items = checkpoint.load(directory, step, **{name: wanted[name] for name in names})
    fresh = {
        "opt_state": experiment.optimizer.init,
        "losses": lambda _: experiment.timestep_sampler_state,
    }
    for name in wanted:
        if name in items:
            continue
        if name in fresh:
            shardings = jax.tree.map(lambda x: x.sharding, wanted[name])
            items[name] = jax.jit(fresh[name], out_shardings=shardings)(items["params"])
        else:
            items[name] = jax.tree.map(jnp.copy, items["ema"])  # each has its memory
    meta = checkpoint.read_meta(directory, step) if "opt_state" in saved else {}
    sharding = replicated(target.step.sharding.mesh)
    put = lambda x: jax.device_put(np.asarray(x, np.int32), sharding)
    return TrainState(
        step=put(meta.get("step", 0)),
        params=items["params"],
        ema={name: items[name] for name in target.ema},
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
        meta: What each checkpoint tells of the run, of JSON: config, mesh, data.
        skip: Records that the run has taken beyond step * batch_size.
    """

    checkpoints: checkpoint.Checkpoints
    replicas: ReplicaCheck
    meta: Mapping[str, Any]
    skip: int = 0

    def check(self, step: int, state: TrainState) -> None:
        """Raises what has gone wrong since the last step; cheap."""
        self.checkpoints.check()
        if self.replicas.is_due(step):
            self.replicas.check(step, state)

    def save(self, step: int, state: TrainState) -> float:
        """Starts to save a state, and returns the seconds until it was handed over."""
        start = time.perf_counter()
        self.replicas.check(step, state)
        records = self.skip + step * self.meta["config"]["batch_size"]
        meta = {**self.meta, "records": records, **checkpoint_meta(state)}
        self.checkpoints.save(step, meta, **checkpoint_items(state))
        return time.perf_counter() - start


def require_checkpoint_space(directory: Path, state: TrainState) -> None:
    """Refuses a disk that not one step has room on; a bucket tells nobody."""
    if not is_remote(directory):
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        require_space(directory / "a step", size)


# ---- how a run went before ----


def read_history(
    directory: Path, step: int, config: Mapping[str, Any], mesh: Mesh
) -> tuple[int, list[str]]:
    """Compares a JSON config and a mesh with those of the step that a run resumes from.

    A run without a checkpoint of its own begins its data at step * batch_size.

    Returns:
        How many records the run has taken beyond step * batch_size, and a sentence for
        each setting that is not as it was.
    """
    if step not in checkpoint.steps(directory):
        return 0, []
    meta = checkpoint.read_meta(directory, step)
    before, size, now = meta["config"], config["batch_size"], dict(mesh.shape)
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
    return records - step * size, changes


def _devices(mesh: Mapping[str, int]) -> str:
    axes = " x ".join(f"{name} {size}" for name, size in mesh.items())
    return f"{math.prod(mesh.values())} devices ({axes})"


# ---- given weights ----


def _init_from_weights(
    experiment: Experiment, target: TrainState, key: jax.Array, init: WeightsRef
) -> Beginning:
    """Goes on with a checkpoint of the same network, or begins with other weights."""
    opened = init.open()
    other = build_experiment(opened.config)
    require_same_family(init.path, type(other.model), experiment.model)
    network = lambda e: (type(e.model), e.model.classes, e.model.null_label, e.shape)
    if (
        isinstance(opened, CheckpointWeights)
        and other.adapter is None  # else its base is loaded, with the adapters in it
        and network(other) == network(experiment)
        and not init.weights_only
    ):
        directory, step = opened.path, opened.step
        required = ("params", "ema")
        state = restore_state(experiment, directory, step, target, required)
        if "opt_state" in checkpoint.items(directory, step):
            return Beginning(state, f"goes on from {init.path}, step {int(state.step)}")
        news = ["optimizer and step new"]
    else:
        state = _convert_weights(experiment, target, key, opened, other, init.path)
        news = ["optimizer and step new", *_describe_news(experiment, other)]
    return Beginning(
        state, f"starts from the weights of {init.path}; {'; '.join(news)}"
    )


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


def _convert_weights(
    experiment: Experiment,
    target: TrainState,
    key: jax.Array,
    opened: LoadedWeights,
    other: Experiment,
    source: str,
) -> TrainState:
    """Begins with the weights of a network of other classes or another resolution.

    All tensors are taken as they are, but for the table of labels where the classes are
    others: it begins anew except for its null row, which guidance needs. Positions are
    no parameters of DiT and SiT.

    Args:
        experiment: Of the run.
        target: The state as shapes with shardings.
        key: For the new table.
        opened: The weights.
        other: Of the weights.
        source: Where they are, for the message.
    """
    model, table = experiment.model, _label_table(experiment.model)
    is_new_table = _has_new_table(model, other.model)
    left_out = {table} if is_new_table else set()
    without = lambda shapes: {k: v for k, v in shapes.items() if k not in left_out}
    wanted = without(flatten_dict(base_shapes(experiment), sep="/"))
    checkpoint.require_same_shapes(source, without(opened.shapes()), wanted)

    def make(key: jax.Array, params: Any, ema: Any) -> TrainState:
        trees = [flatten_dict(tree, sep="/") for tree in (params, ema)]
        if is_new_table:
            fresh = init_params(model, experiment.shape, key)
            fresh = flatten_dict(fresh, sep="/")[table]
            for tree in trees:
                rows = fresh
                if model.null_label and other.model.null_label:
                    rows = jnp.concatenate([fresh[:-1], tree[table][-1:]])
                tree[table] = rows
        params, ema = (unflatten_dict(tree, sep="/") for tree in trees)
        state = create_state(experiment, params)
        return state.replace(ema=init_ema(ema, experiment.ema_decay))

    shardings = jax.tree.map(lambda x: x.sharding, target)
    mesh = target.step.sharding.mesh
    params, ema = (opened.load(item, other, mesh) for item in ("params", "ema"))
    return jax.jit(make, out_shardings=shardings)(key, params, ema)


def _describe_news(experiment: Experiment, other: Experiment) -> list[str]:
    """Returns what a run begins anew with the weights of another network."""
    model, theirs, news = experiment.model, other.model, []
    if _has_new_table(model, theirs):
        shapes = flatten_dict(base_shapes(experiment), sep="/")
        table = _label_table(model)
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
    return news


def _has_new_table(model: Any, other: Any) -> bool:
    labels = lambda model: (model.classes, model.null_label)
    return labels(model) != labels(other)


def _label_table(model: Any) -> str:
    return next(flax for torch, flax, _ in rules_for(model) if torch == LABEL_TABLE)


# ---- adapters ----


def init_lora(
    experiment: Experiment,
    mesh: Mesh,
    seed: int,
    directory: Path,
    init: str | None = None,
) -> Beginning:
    """Begins a run that trains adapters: over its base, or where it left off.

    Args:
        experiment: What is built from the config.
        mesh: The devices.
        seed: For fresh adapters.
        directory: The run's own checkpoints; those of adapters say where their base is.
        init: A workdir or checkpoint of the base, or of adapters to begin with.
    """
    own, path, adapters = checkpoint.steps(directory), init, None
    record = _read_base_record(directory, own)
    if init is not None:
        require_checkpoint(init)
        source, step = checkpoint.find_step(init)
        if theirs := _read_base_record(source, [step]):
            adapters = (source, step)
            record, path = record or theirs, None
    if path is None and record is None:
        raise UserError("config.adapter adapts a trained network: add --init BASE")
    base, record = load_base(experiment, mesh, path or record["path"], record)
    base = experiment.adapter.quantize_base(base)

    def make(base: Any) -> TrainState:
        params = experiment.adapter.add_adapters(base, jax.random.key(seed))
        return create_state(experiment, params)

    shardings = sharding_rules.state_shardings(mesh, jax.eval_shape(make, base))
    state = jax.jit(make, out_shardings=shardings, donate_argnums=0)(base)
    target, frozen = with_shardings(state, shardings), state.frozen_params
    origin = "starts anew"
    if own:
        state, origin, _ = _restore_newest(experiment, directory, target)
    elif adapters:
        required = ("params", "ema")
        state = restore_state(experiment, *adapters, target, required)
        origin = f"goes on from {init}, step {int(state.step)}"
    of_base = f"adapters of {record['path']}/{record['step']}, {record['sha256'][:12]}"
    state = state.replace(frozen_params=frozen)
    return Beginning(state, f"{origin}, {of_base}", {"base": record})


def _read_base_record(
    directory: Path, numbers: Collection[int]
) -> dict[str, Any] | None:
    """Returns where the base of adapters is, None where the steps are of a network."""
    for step in sorted(numbers, reverse=True):
        with contextlib.suppress(checkpoint.DamagedCheckpoint):
            return checkpoint.read_meta(directory, step).get("base")
    return None
