"""Trains what a config describes: python train.py --config configs/digits.py

The same command in the same workdir goes on where its last checkpoint left off.
"""

import contextlib
from functools import partial
from pathlib import Path

import jax

from configs import published
from sit_jax import config as configs
from sit_jax.adapters.weights import join
from sit_jax.checkpoint import Checkpoints, steps
from sit_jax.cli.main import StopSignal, entry_point, make_parser, parse_args
from sit_jax.convert.given import Given, add_flags
from sit_jax.convert.vae_files import load_vae, with_vae
from sit_jax.data.cache import about_data
from sit_jax.data.feed import abstract_batch, batches
from sit_jax.data.sources import Synthetic
from sit_jax.errors import UserError
from sit_jax.experiment import validate
from sit_jax.files import write_json
from sit_jax.manifest import environment
from sit_jax.models.flops import step_macs
from sit_jax.parallel import hardware, multihost
from sit_jax.parallel.mesh import make_mesh, replicated
from sit_jax.planning import planning, program
from sit_jax.planning.introduction import introduce
from sit_jax.trainer import heap, program_cache
from sit_jax.trainer.adapting import begin_adapted
from sit_jax.trainer.history import history
from sit_jax.trainer.keeper import Keeper
from sit_jax.trainer.logging import RunLog
from sit_jax.trainer.meter import Meter
from sit_jax.trainer.replicas import Replicas
from sit_jax.trainer.start import begin, require_room
from sit_jax.trainer.watching import Views
from sit_jax.trainer.workdir import held, open_workdir
from sit_jax.training.state import ema_item_names, sampled_ema
from sit_jax.training.step import tensor_names


@entry_point
def main():
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--workdir", metavar="DIR", help="default: runs/CONFIG")
    parser.add_argument("--wandb", metavar="PROJECT", help="also log to wandb")
    add_flags(parser)
    multihost.add_flags(parser)
    planning.add_flags(parser)
    args, overrides = parse_args(parser)
    planning.check(args)
    if not args.plan:
        multihost.initialize(args, heed_sigterm=True)
        program_cache.begin()
    config = configs.load(args.config)
    configs.override(config, overrides)
    if args.plan:
        return planning.training(args, config)
    workdir = args.workdir or f"runs/{Path(args.config).stem}"
    given = Given(args.init, args.weights_only, args.family, args.heads, published)
    return train(config, workdir, given, args.wandb)


NOTHING = Given()


def train(config, workdir, given=NOTHING, wandb=None):
    """Runs to config.steps, or until asked to stop; -> exit code."""
    mesh = make_mesh(**config.mesh)
    source, parts = _made(config, mesh)
    stored = configs.to_json(config)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(held(workdir, stored)) / "checkpoints"
        state, origin, more = _begin(config, parts, mesh, folder, given)
        first = int(state.step)
        if first >= config.steps and not steps(folder):
            raise UserError(
                f"{given.path} is at step {first} and config.steps is {config.steps}; "
                "set a larger --config.steps, or --weights-only to begin at step 0"
            )
        require_room(folder, state)
        past = history(folder, first, stored, mesh)
        watch = Replicas(config.get("check_replicas", 0), state)
        workdir = open_workdir(workdir, stored)  # from here on it is this run's
        items = ema_item_names(parts.ema_decay)
        saved = Checkpoints(folder, config.keep_last, config.keep_every, items)
        stack.callback(saved.close)
        log = RunLog(workdir, config.steps, first, wandb and {"project": wandb})
        stack.callback(log.close)
        for line in (f"{workdir} {origin}", *past.changes):
            log.say(line)
        if multihost.is_primary():
            write_json(workdir / "manifest.json", {"config": stored, **environment()})
        if first >= config.steps:
            log.say(f"nothing to do: config.steps is {config.steps}")
            return 0
        size, how = config.batch_size, {"say": log.say, "skip": past.skip}
        how["workers"] = config.get("workers", 0)
        feed = batches(source, size, config.seed, first, mesh, **how)
        stack.callback(feed.close)
        introduce(log.say, config, parts, mesh, state, source)
        names = getattr(source, "class_names", None)
        look = Views(log, config, parts, mesh, names)
        stop = stack.enter_context(StopSignal())
        about = {"config": stored, **about_data(source, parts.codec), **more}
        keeper = Keeper(saved, watch, past, about, parts.ema_decay)
        run = (state, feed, log, saved, keeper, look, stop)
        return _loop(config, parts, mesh, source, *run)


def _made(config, mesh):
    """-> source and experiment of a config that fit each other and the mesh."""
    source = _source(config)
    if config.get("count_classes"):
        config.model.classes = source.classes
    parts = _experiment(config, mesh)
    validate(config, parts, source, mesh)
    return source, parts


def _begin(config, parts, mesh, folder, given):
    """-> TrainState, a sentence about it, and what the checkpoints' meta say too."""
    where = (parts, mesh, config.seed, folder)
    if parts.adapter is None:
        more = (given.path, given.weights_only, given.torch_file)
        return (*begin(*where, *more), {})
    return begin_adapted(*where, given.path)


def _experiment(config, mesh):
    """The experiment with its VAE, and a model that computes as training shall."""
    parts = program.training_recipe(config)
    if config.get("vae"):
        place = replicated(mesh)
        parts = with_vae(parts, load_vae(config.vae, config.precision.vae, place))
    return parts


def _loop(config, parts, mesh, source, state, feed, log, saved, keeper, look, stop):
    first, key = int(state.step), jax.random.key(config.seed)
    names = tensor_names(state)
    shapes = abstract_batch(source, config.batch_size, mesh)
    step = _compiled(log, config, parts, mesh, state, shapes, key)
    keeper.compile(state)
    look.catch_up(first, _average(state, parts))
    batch = next(feed)  # was read meanwhile
    meter = _meter(config, parts)
    feed.waited()
    for at in range(first + 1, config.steps + 1):
        batch = batch or next(feed)
        state, metrics = step(state, parts.codec, batch, key)
        batch = None
        _report(log, meter.add(at, metrics, feed.waited()), names, config, saved)
        log.progress(at)
        keeper.look(at, state)
        asked = multihost.reached_stop(at - first, stop.is_set)
        saves = asked or at == config.steps or at % config.save_every == 0
        if saves:
            _report(log, meter.flush(), names, config, saved)
            log.keep()
            meter.pause(keeper.save(at, state))
        meter.pause(look(at, _average(state, parts), asked))
        if asked:
            log.say(f"stopped at step {at}; the same command goes on from there")
            break
    saved.wait()
    log.say(f"saved step {saved.latest()} in {saved.directory}")
    return 0


def _average(state, parts):
    """What is sampled: the whole network's weights, also where few are trained."""
    return join(sampled_ema(state.ema, parts.ema_decay), state.frozen)


def _compiled(log, config, parts, mesh, state, batch, key):
    where = jax.tree.map(lambda x: x.sharding, state)
    step = program.train_step(config, parts, mesh, where)
    lower = partial(step.lower, state, parts.codec, batch, key)
    compiled, how = program_cache.compiled(lower)
    log.say(f"compiled the training step {how}")
    if heap.kept:
        found = compiled.memory_analysis()
        each = found.argument_size_in_bytes + found.temp_size_in_bytes
        heap.settle(jax.default_backend(), each * jax.local_device_count())
    return compiled


def _report(log, arrived, names, config, saved):
    """Logs the steps that have arrived; too many without effect end the run."""
    for at, metrics, line in arrived:
        total, streak = (int(n) for n in metrics["skipped"])
        if streak:
            where = names[int(metrics["bad"])]
            log.say(f"step {at} skipped: {where} is not finite ({total} so far)")
        if streak >= config.max_skipped:
            saved.wait()
            good = saved.latest()
            keep = f"step {good} in {saved.directory}" if good else "none yet"
            raise UserError(
                f"{streak} steps in a row were not finite, first in {where}, at step "
                f"{at}; last good checkpoint: {keep}"
            )
        if line is not None:
            line["skipped"] = total
            if (memory := hardware.peak_memory()) is not None:
                line["peak_memory_gb"] = memory / 1e9
            log.scalars(at, line)


def _meter(config, parts):
    """Rates; a training step is reckoned as three forward passes, as in the papers."""
    macs = step_macs(parts.model, parts.shape)
    flops = 6 * macs * config.batch_size
    peak = hardware.peak_flops()
    peak = peak and peak * jax.device_count()
    return Meter(config.log_every, config.batch_size, flops, peak)


def _source(config):
    if config.synthetic:
        return Synthetic(tuple(config.shape), config.model.classes)
    return configs.build(config.source)


if __name__ == "__main__":
    heap.keep()
    main()
