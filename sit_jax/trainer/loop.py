"""Trains what a config describes: `train()` reads from top to bottom."""

import contextlib
import dataclasses
import time
from collections.abc import Iterable
from functools import partial
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from sit_jax.adapters.weights import join
from sit_jax.checkpoint import Checkpoints, steps
from sit_jax.config import build, spec, to_json
from sit_jax.convert.open import WeightsRef
from sit_jax.convert.vae import load_vae, with_vae
from sit_jax.data.latent_cache import describe_data
from sit_jax.data.loader import abstract_batch, batches
from sit_jax.data.sources import Synthetic
from sit_jax.errors import UserError
from sit_jax.experiment import Experiment, validate
from sit_jax.files import PathLike, write_json
from sit_jax.manifest import environment
from sit_jax.models import attention
from sit_jax.models.flops import forward_macs, step_macs
from sit_jax.parallel import hardware, multihost
from sit_jax.parallel.mesh import make_mesh, replicated
from sit_jax.planning import programs
from sit_jax.planning.memory import describe_unsplit
from sit_jax.trainer.compile import ReplicaCheck, limit_kept_memory
from sit_jax.trainer.previews import Previews
from sit_jax.trainer.resume import (
    FRESH,
    CheckpointWriter,
    read_history,
    require_checkpoint_space,
    restore_or_init,
)
from sit_jax.trainer.run_log import ArrivedStep, MetricsMeter, RunLog
from sit_jax.trainer.workdir import locked_workdir, open_workdir
from sit_jax.training.state import TrainState
from sit_jax.training.step import tensor_names


class StopFlag(contextlib.AbstractContextManager, Protocol):
    """Tells, inside its block, whether the run was asked to stop."""

    is_set: bool


class NeverStop(contextlib.nullcontext):
    """The StopFlag of a run that nobody asks to stop."""

    is_set = False


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose folder is open.

    Attributes:
        config: A ConfigDict.
        experiment: What is built from it.
        mesh: The devices.
        source: The data.
        log: The record of the run.
        writer: Saves states.
    """

    config: Any
    experiment: Experiment
    mesh: Mesh
    source: Any
    log: RunLog
    writer: CheckpointWriter


def train(
    config: Any,
    workdir: PathLike,
    init: WeightsRef = FRESH,
    *,
    wandb: str | None = None,
    stop: StopFlag | None = None,
) -> None:
    """Trains to config.steps, or until asked to stop. The same call resumes the run.

    Args:
        config: A ConfigDict, as of configs/digits.py.
        workdir: The run's folder, on a disk or in a bucket.
        init: Weights to begin with while the run has no checkpoint of its own.
        wandb: A project of Weights & Biases to log to.
        stop: Whether to stop after the step under way, and save it.

    Raises:
        UserError: The config cannot be trained, or the folder is another run's.
    """
    # build and validate
    mesh = make_mesh(**config.mesh)
    source, experiment = _build(config, mesh)
    stored = to_json(config)
    with contextlib.ExitStack() as stack:
        # begin or resume
        workdir = stack.enter_context(locked_workdir(workdir, stored))
        directory = workdir / "checkpoints"
        state, origin, meta = restore_or_init(
            experiment, mesh, config.seed, directory, init
        )
        first = int(state.step)
        if first >= config.steps and not steps(directory):
            raise UserError(
                f"{init.path} is at step {first} and config.steps is {config.steps}; "
                "set a larger --config.steps, or --weights-only to begin at step 0"
            )
        require_checkpoint_space(directory, state)
        skip, changes = read_history(directory, first, stored, mesh)

        # open the run's folder, which is this run's from here on
        open_workdir(workdir, stored)
        checkpoints = Checkpoints(directory, config.keep_last, config.keep_every)
        stack.callback(checkpoints.close)
        log = stack.enter_context(RunLog(workdir, config.steps, first, wandb))
        for line in (f"{workdir} {origin}", *changes):
            log.say(line)
        if multihost.is_primary():
            write_json(workdir / "manifest.json", {"config": stored, **environment()})
        if first >= config.steps:
            log.say(f"nothing to do: config.steps is {config.steps}")
            return
        replicas = ReplicaCheck(config.get("check_replicas", 0), state)
        about = {"config": stored, "mesh": dict(mesh.shape), **meta}
        about |= describe_data(source, experiment.codec)
        writer = CheckpointWriter(checkpoints, replicas, about, skip)
        run = Run(config, experiment, mesh, source, log, writer)
        _train_steps(run, state, stop or NeverStop())


def _train_steps(run: Run, state: TrainState, stop: StopFlag) -> None:
    """Takes the steps of a run from a state on, and logs, saves and draws."""
    config, log, writer = run.config, run.log, run.writer
    first = int(state.step)
    log_summary(run, state)
    feed = batches(  # which are read from here on
        run.source,
        config.batch_size,
        config.seed,
        run.mesh,
        first=first * config.batch_size + writer.skip,
        say=log.say,
        workers=config.get("workers", 0),
    )
    with feed, stop:
        # compile
        names = run.source.class_names
        previews = Previews(log, config, run.experiment, run.mesh, names)
        key, codec = jax.random.key(config.seed), run.experiment.codec
        step = _compile_step(run, state, key)
        ema = lambda state: join(state.ema["ema"], state.frozen_params)
        batch = next(feed)  # was read meanwhile
        meter = _make_meter(config, run.experiment)
        report = partial(_report, run, tensor_names(state))
        feed.waited()

        # the loop
        for number in range(first + 1, config.steps + 1):
            batch = batch or next(feed)
            state, metrics = step(state, codec, batch, key)
            batch = None
            report(meter.add(number, metrics, feed.waited()))
            log.progress(number)
            writer.check(number, state)
            stopped = multihost.reached_stop(number - first, stop.is_set)
            is_last = stopped or number == config.steps
            if is_last or number % config.save_every == 0:
                report(meter.flush())
                log.flush()
                meter.pause(writer.save(number, state))
            meter.pause(previews.draw(number, ema(state), is_last=stopped))
            if stopped:
                log.say(
                    f"stopped at step {number}; the same command goes on from there"
                )
                break
        writer.checkpoints.wait()
        directory = writer.checkpoints.directory
        log.say(f"saved step {steps(directory)[-1]} in {directory}")


def _compile_step(run: Run, state: TrainState, key: jax.Array) -> Any:
    start = time.perf_counter()
    batch = abstract_batch(run.source, run.config.batch_size, run.mesh)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = programs.jit_train_step(run.config, run.experiment, run.mesh, shardings)
    program = step.lower(state, run.experiment.codec, batch, key).compile()
    seconds = time.perf_counter() - start
    run.log.say(f"compiled the training step in {seconds:.1f} s")
    limit_kept_memory(program)
    return program


def log_summary(run: Run, state: TrainState) -> None:
    """Tells the network, its data and its devices, before the first step."""
    model, source = run.experiment.model, run.source
    trees = state.params, state.frozen_params
    count, frozen = (sum(x.size for x in jax.tree.leaves(tree)) for tree in trees)
    also_frozen = f", {frozen:,} more are frozen" if frozen else ""
    macs = forward_macs(model, run.experiment.shape)
    run.log.say(
        f"{type(model).__name__} with {count:,} parameters{also_frozen}, "
        f"{macs / 1e9:.3g} GMAC an image; {len(source):,} records; batch "
        f"{run.config.batch_size} on {jax.device_count()} x "
        f"{jax.devices()[0].device_kind}; EMA decay {run.config.ema_decay}; "
        f"attention {attention.attention_name(model)}"
    )
    for line in (*source.remarks, *describe_unsplit(run.mesh, state.params)):
        run.log.say(line)


def _build(config: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Returns the data source and the experiment, which fit each other and the mesh."""
    if config.synthetic:
        fields = {"shape": tuple(config.shape), "classes": config.model.classes}
        source = build(spec(Synthetic, **fields))  # which checks their ranges
    else:
        source = build(config.source)
    if config.get("count_classes"):
        config.model.classes = source.classes
    experiment = programs.build_training_experiment(config)
    if config.get("vae"):
        vae = load_vae(config.vae, config.precision.vae, replicated(mesh))
        experiment = with_vae(experiment, vae)
    validate(config, experiment, source, mesh)
    return source, experiment


def _make_meter(config: Any, experiment: Any) -> MetricsMeter:
    """Counts a training step as three forward passes, as the papers do."""
    macs = step_macs(experiment.model, experiment.shape)
    flops = 6 * macs * config.batch_size
    peak = hardware.peak_flops()
    peak = peak and peak * jax.device_count()
    return MetricsMeter(config.log_every, config.batch_size, flops, peak)


def _report(run: Run, names: list[str], arrived: Iterable[ArrivedStep]) -> None:
    """Logs the steps that have arrived; too many without effect end the run."""
    for step, metrics, line in arrived:
        total, streak = (int(n) for n in metrics["skipped"])
        if streak:
            tensor = names[int(metrics["bad"])]
            run.log.say(f"step {step} skipped: {tensor} is not finite ({total} so far)")
        if streak >= run.config.max_skipped:
            checkpoints = run.writer.checkpoints
            checkpoints.wait()
            saved = steps(checkpoints.directory)
            last = (
                f"step {saved[-1]} in {checkpoints.directory}" if saved else "none yet"
            )
            raise UserError(
                f"{streak} steps in a row were not finite, first in {tensor}, at step "
                f"{step}; last good checkpoint: {last}"
            )
        if line is not None:
            line["skipped"] = total
            if (memory := hardware.peak_memory()) is not None:
                line["peak_memory_gb"] = memory / 1e9
            run.log.scalars(step, line)
