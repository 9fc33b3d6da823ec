"""The training step of a config: as train.py runs it, and as a plan compiles it."""

import dataclasses
from functools import partial

import jax

from sit_jax import placement, precision, sharding
from sit_jax.models import attention
from sit_jax.recipe import recipe
from sit_jax.training import init_state, make_train_step


def training_recipe(config):
    """The recipe, with a model that computes in bfloat16 if training shall."""
    parts, word = recipe(config), training_precision(config)
    if word.dtype == "float32":  # then model.dtype decides
        return parts
    model = precision.computing(word, parts.model)
    return dataclasses.replace(parts, model=model)


def training_precision(config):
    words = config.get("precision")  # absent in configs from before there was a choice
    return precision.chosen(words.training if words else "fast")


def state_shapes(parts, mesh):
    """-> the TrainState of a run as shapes, and its shardings; nothing is allocated."""
    begin = partial(init_state, parts.model, parts.tx, parts.shape)
    begin = partial(begin, decay=parts.ema_decay, losses=parts.losses)
    shapes = jax.eval_shape(begin, jax.random.key(0))
    return shapes, placement.of_state(mesh, shapes)


def train_step(config, parts, mesh, where, platform=None):
    """-> jitted step(state, codec, batch, key) -> (state, metrics) on a mesh.

    where: shardings of the state, which is donated. platform: where the step will run,
    if not on this process's backend.
    """
    step = make_train_step(
        attention.settled(parts.model, platform),
        parts.process,
        parts.tx,
        parts.ema_decay,
        config.label_drop,
        config.accumulate,
        parts.timesteps,
        config.get("log_quartiles", False),
        place=placement.gathered(mesh),
    )
    step = precision.applied(training_precision(config), step, platform)
    step = sharding.on(mesh, step)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))
